"""The number of threads of MLX's matrix products on the CPU. The mirror is `icenet_torch/tools/threads.py`."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.core.host import blas, threads


def num_threads() -> int | None:
    """Returns the number of threads; None if the BLAS is not one whose number can be set."""
    return blas.num_threads()


def set_num_threads(number: int) -> None:
    """Sets the number of threads for this process."""
    blas.set_num_threads(number)


def choose_num_threads(rows: int, width: int) -> int | None:
    """Sets the number of threads, 1 or all, with which products `[rows, width] x [width, 4 width]` are faster.

    Returns:
        The number; None if it cannot be set.
    """
    available = num_threads()
    if available is None:
        return None
    with mx.stream(mx.cpu):
        x, weight = mx.ones((rows, width)), mx.ones((4 * width, width))
        return threads.fastest(lambda: mx.eval(x @ weight.T), set_num_threads, available)
