"""The memory allocator of the process, for arrays on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys

VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""Environment variables with which users set the allocator."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """Makes glibc keep the memory of large arrays for the next ones, up to 2 GB. Does nothing elsewhere.

    glibc asks the system for each array of 32 MB or more and returns it when the array is freed, so that the system
    clears each page again. With the weights of a transformer of 70 million parameters this was a third of the time of
    a training step of MLX, which allocates the result of each operation, and 29 % of one of PyTorch (2 x 128 tokens;
    LSTM 4 x 512 8 %, ResNet-50 5 %). Variables that users set keep their values.
    """
    if sys.platform != "linux" or any(os.environ.get(name) for name in VARIABLES):
        return
    library = ctypes.CDLL(None)
    # musl has no such function. Older versions of glibc refuse more than 32 MB for the first threshold. The second
    # one is then not set either, because it alone would keep the first at 128 kB.
    if hasattr(library, "mallopt") and library.mallopt(_M_MMAP_THRESHOLD, 1 << 30):
        library.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
