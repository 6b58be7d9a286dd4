"""What the kernels of training share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array

THREADS = 512
"""Threads of a block."""
BLOCKS = 528
"""Most blocks of a kernel that goes through an array in steps: four for each multiprocessor of an H100."""


def chunks(arrays: Sequence[Array], size: int, filler: Array) -> Iterator[list[Array]]:
    """Yields parts of arrays of one size; the last one is filled up."""
    for start in range(0, len(arrays), size):
        part = list(arrays[start : start + size])
        yield part + [filler] * (size - len(part))


def choice(count: int, first: str, pointers: Sequence[str]) -> str:
    """Returns source that selects the arrays of a block: an array has a block for each `VALUES` of its values.

    Branches select them. A table that is indexed at run time would be written to memory by each thread.

    Args:
        count: Number of arrays.
        first: The inputs whose sizes count, without their number.
        pointers: The variables to set, each to the input or output of its name and number. `size` becomes the number
            of values, and `block` that of the block within the array.
    """
    choices = []
    for index in range(count):
        chosen = " ".join(f"{pointer} = {pointer}{index};" for pointer in pointers)
        choices.append(f"if (is_in({first}{index}_shape[0])) {{ {chosen} }}")
    return """
    int block = blockIdx.x, size = 0;
    auto is_in = [&](int values) {
      const int blocks = (values + VALUES - 1) / VALUES;
      size = values;
      if (block < blocks) return true;
      block -= blocks;
      return false;
    };
    """ + " else ".join([*choices, "return;"])


@lru_cache
def floats(*values: float) -> Array:
    return _evaluated(mx.array(values, mx.float32))


@lru_cache
def integers(*values: int) -> Array:
    return _evaluated(mx.array(values, mx.int32))


def _evaluated(array: Array) -> Array:
    mx.eval(array)  # not lazy: another thread may use it
    return array
