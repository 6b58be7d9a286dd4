"""The number of threads of a command's process on a CPU."""

from __future__ import annotations

import os

from icenet.core import backends
from icenet.core.host import threads


def choose_num_threads(backend: str, rows: int, width: int) -> None:
    """Sets this process's number of threads, 1 or all, with which products of this size are faster at the moment.

    Does nothing if an environment variable sets the number (`threads.VARIABLES`), or if the backend has no BLAS whose
    number can be set.

    Args:
        backend: mlx or torch. With PyTorch's BLAS the number holds for both.
        rows: Number of rows (tokens) of a product.
        width: Width of the model.
    """
    if not any(os.environ.get(name) for name in threads.VARIABLES):
        backends.module(backend, "tools.threads").choose_num_threads(rows, width)
