"""Copies large arrays in several threads, and transposed ones a cache line at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core.host.threads import for_ranges

Array = npt.NDArray[Any]

_CACHE_LINE = 64
PART = 1 << 22
"""Bytes of the smallest part for a thread of its own."""
MOST_THREADS = 4
"""More do not read memory faster."""


def copy_to(target: Array, source: Array) -> None:
    """Writes the values of an array to another one of the same shape.

    Most of the time goes to the pages of new memory, which the system finds faster for several threads.

    Args:
        target: The array to write, C-contiguous.
        source: The values, with any strides and any dtype that numpy casts to that of `target`.
    """
    if not target.ndim or not target.size:
        target[...] = source
        return
    # numpy copies in the order of the target, which reads a cache line of a transposed array for each value
    is_transposed = source.ndim > 1 and abs(source.strides[-1]) > abs(source.strides[0])
    axis, width = (-1, _CACHE_LINE // source.itemsize) if is_transposed else (0, target.shape[0])
    targets, sources = np.moveaxis(target, axis, 0), np.moveaxis(source, axis, 0)

    def copy(start: int, stop: int) -> None:
        for first in range(start, stop, width):
            last = min(first + width, stop)
            np.copyto(targets[first:last], sources[first:last], casting="unsafe")

    rows = len(targets)
    for_ranges(copy, rows, max(1, rows * PART // max(1, target.nbytes)), MOST_THREADS)


def contiguous(array: Array) -> Array:
    """Returns an array with C-contiguous memory: the array itself if it has one."""
    if array.flags.c_contiguous:
        return array
    found: Array = np.empty(array.shape, array.dtype)
    copy_to(found, array)
    return found
