"""What the kernels of training share."""

from __future__ import annotations

from functools import lru_cache

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array

THREADS = 512
"""Threads of a block."""
BLOCKS = 528
"""Most blocks of a kernel that goes through an array in steps: four for each multiprocessor of an H100."""


@lru_cache
def floats(*values: float) -> Array:
    return _evaluated(mx.array(values, mx.float32))


@lru_cache
def integers(*values: int) -> Array:
    return _evaluated(mx.array(values, mx.int32))


def _evaluated(array: Array) -> Array:
    mx.eval(array)  # not lazy: another thread may use it
    return array
