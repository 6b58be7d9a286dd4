"""What a kernel may use on a GPU, MLX."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import lru_cache

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx


@dataclass(frozen=True)
class Limits:
    """What a kernel may use.

    Args:
        multiprocessors: Number of thread blocks that run at once, one on each multiprocessor.
        shared_memory: Bytes of shared memory for weights, of each block; 0 to read the weights from the device's
            memory at each step.
        rows: Largest number of rows of the batch of a warp: its sums, eight per row, must fit in registers.
        vector: Largest number of values that a thread loads at once.
        has_tensor_cores: Whether the tensor cores of CUDA multiply bf16 and fp16.
    """

    multiprocessors: int
    shared_memory: int
    rows: int = 16
    vector: int = 4
    has_tensor_cores: bool = False


def _device_attribute(attribute: int, index: int) -> int:
    """Returns an attribute of a CUDA device from the driver; MLX does not report it."""
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    device, value = ctypes.c_int(), ctypes.c_int()
    errors = [
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), index),
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device),
    ]
    if any(errors):
        raise OSError(f"the CUDA driver returned the errors {errors}")
    return value.value


def on_metal() -> bool:
    """Returns whether MLX's GPU is Apple's."""
    return mx.metal.is_available()


@lru_cache
def device_limits(index: int = 0) -> Limits | None:
    """Returns what a kernel may use on a GPU, or None where there are no kernels."""
    if on_metal():
        return Limits(multiprocessors=64, shared_memory=0, rows=8, vector=1)
    try:
        multiprocessors = _device_attribute(16, index)  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        shared_memory = _device_attribute(97, index)  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        capability = _device_attribute(75, index)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    except (OSError, AttributeError):
        return None
    return Limits(multiprocessors, shared_memory - _BYTES_OF_SUMS, has_tensor_cores=capability >= 8)


_BYTES_OF_SUMS = 8 * 1024
"""Shared memory that a kernel needs in addition to the weights, with a margin."""
