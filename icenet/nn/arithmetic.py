"""The arithmetic of fp32 products, MLX: full fp32, or TF32 on GPUs that have it.

TF32 rounds the factors of a product to 10 bits of mantissa. `allow_tf32` of the configuration decides whether matrix
products, convolutions and attention in fp32 may use it.
"""

from __future__ import annotations

import os
import platform
import re
import warnings

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np

from icenet.core.errors import ArithmeticWarning, BackendError

VARIABLE = "MLX_ENABLE_TF32"


def set_tf32(device: mx.Device, allow: bool) -> None:
    """Decides whether fp32 products on a GPU may use TF32, for this process.

    MLX has no other switch than the environment variable MLX_ENABLE_TF32 (default 1). It reads it once, at the
    process's first product on a GPU that has TF32 (`env::enable_tf32` in mlx/utils.h). The variable is set here for
    one small product, whose result shows the arithmetic in use. Nothing is set for a CPU.

    Raises:
        BackendError: TF32 is not allowed, and MLX already computes in TF32 in this process.

    Warns:
        ArithmeticWarning: TF32 is allowed, and MLX does not use it in this process; or the environment variable
            contradicts `allow`, which has precedence.
    """
    if not has_tf32(device):
        return
    value = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(int(allow))
    try:
        used = uses_tf32(device)
    finally:
        if value is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = value
    if used and not allow:
        raise BackendError(
            "allow_tf32 is false, but MLX computes fp32 products in TF32 in this process since its first product on "
            f"the GPU: set {VARIABLE}=0 before Python starts, or allow_tf32: true"
        )
    if allow and not used:
        text = "allow_tf32: true has no effect: MLX computes in full fp32 since this process's first product"
        warnings.warn(f"{text} on the GPU; use a new process", ArithmeticWarning, stacklevel=2)
    elif value and (value != "0") != allow:
        text = f"{VARIABLE}={value} has no effect on IceNet: the config has allow_tf32: {str(allow).lower()}"
        warnings.warn(text, ArithmeticWarning, stacklevel=2)


def has_tf32(device: mx.Device) -> bool:
    """Returns whether a device has TF32: GPUs with CUDA, and Apple's from M5 on."""
    if device.type == mx.DeviceType.cpu:
        return False
    generation = re.search(r"Apple M(\d+)", chip())
    return bool(mx.cuda.is_available()) or (generation is not None and int(generation[1]) >= 5)


def uses_tf32(device: mx.Device) -> bool:
    """Returns whether a product of fp32 matrices on a device is computed in TF32. It computes one."""
    if device.type == mx.DeviceType.cpu:
        return False
    values = np.full((512, 512), 1 + 2**-12, np.float32)  # TF32 rounds it to 1
    with mx.stream(device):
        product = np.array(mx.array(values) @ mx.array(np.eye(512, dtype=np.float32)))
    return not np.array_equal(product, values)


def chip() -> str:
    """Returns the name of MLX's default device."""
    return str(mx.device_info().get("device_name", platform.processor()))
