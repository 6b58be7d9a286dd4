"""The number of threads of PyTorch's operations on the CPU. The mirror is `icenet/tools/threads.py`."""

from __future__ import annotations

import torch

from icenet.core.host import threads


def num_threads() -> int | None:
    """Returns the number of threads."""
    return torch.get_num_threads()


def set_num_threads(number: int) -> None:
    """Sets the number of threads for this process."""
    torch.set_num_threads(number)


@torch.inference_mode()
def choose_num_threads(rows: int, width: int) -> int | None:
    """Sets the number of threads, 1 or all, with which products `[rows, width] x [width, 4 width]` are faster.

    Returns:
        The number.
    """
    available = torch.get_num_threads()
    x, weight = torch.ones(rows, width), torch.ones(4 * width, width)
    return threads.fastest(lambda: x @ weight.T, set_num_threads, available)
