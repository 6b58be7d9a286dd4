"""Arrays of MLX: dtypes, devices, and in and out of numpy."""

from __future__ import annotations

from typing import TypeAlias

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np

from icenet.core.weights.safetensors import BFLOAT16

Array: TypeAlias = mx.array


def on_cpu() -> bool:
    """True where products in half precision are slow and are better done in fp32 (20x on x86)."""
    return mx.default_device().type == mx.DeviceType.cpu


def is_half(x: Array) -> bool:
    return x.dtype in (mx.float16, mx.bfloat16)


def to_numpy(array: mx.array) -> np.ndarray:
    """The array's values and bits; bfloat16 becomes `icenet.core.weights.safetensors.BFLOAT16`."""
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(BFLOAT16)
    return np.array(array)


def from_numpy(array: np.ndarray) -> mx.array:
    """The inverse of `to_numpy`."""
    if array.dtype == BFLOAT16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)
