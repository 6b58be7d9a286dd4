"""Arrays in and out of MLX, bit for bit. The mirror is `icenet_torch/state_dict.py`."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np

from icenet.core.tensor_file import BFLOAT16


def to_numpy(array: mx.array) -> np.ndarray:
    """The array's values and bits; bfloat16 becomes `icenet.core.tensor_file.BFLOAT16`."""
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(BFLOAT16)
    return np.array(array)


def from_numpy(array: np.ndarray) -> mx.array:
    """The inverse of `to_numpy`."""
    if array.dtype == BFLOAT16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)
