"""CUDA kernels of training, MLX. Each replaces several passes of MLX's own operations over the same memory.

On Metal and on a CPU the formulas of the modules that call them are used.
"""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array, on_cpu
from icenet.nn.training_kernels.activations import activation
from icenet.nn.training_kernels.losses import cross_entropy
from icenet.nn.training_kernels.norms import batch_norm, column_sums, layer_norm
from icenet.nn.training_kernels.pooling import max_pool
from icenet.nn.training_kernels.updates import adam, sums_of_squares

__all__ = [
    "activation",
    "adam",
    "batch_norm",
    "column_sums",
    "cross_entropy",
    "has_kernels",
    "is_worthwhile",
    "layer_norm",
    "max_pool",
    "sums_of_squares",
]


def has_kernels() -> bool:
    """Returns whether the kernels of this module can be used: on CUDA."""
    return not on_cpu() and bool(mx.cuda.is_available())


def is_worthwhile(x: Array) -> bool:
    """Returns whether an array has many values, on CUDA. For one token `mx.compile` fuses the operations instead."""
    return x.size >= 1 << 18 and has_kernels()
