"""MLX on this machine: version, devices, BLAS, speed, TF32. `icenet doctor` runs it in a separate process."""

from __future__ import annotations

from typing import Any

import icenet.blas

import mlx.core as mx

from icenet.core.report.environment import (
    MATRIX_SIZE,
    SMALL_ROWS,
    SMALL_WIDTH,
    Environment,
    device_names,
    microseconds,
)
from icenet.core.report.environment import matmul_gflops as measure
from icenet.nn.arithmetic import chip, has_tf32, set_tf32, uses_tf32
from icenet.tools import threads

VERSION: str = mx.__version__  # type: ignore[attr-defined]  # missing in the type stub


def environment() -> Environment:
    """Returns the description that `icenet doctor` shows (about 1 s: it times matrix products)."""
    precision = tf32(mx.default_device())  # before any other product: the first one on a GPU decides
    num_gpus = mx.device_count(mx.gpu) if mx.is_available(mx.gpu) else 0
    gpu = _gpu_kind()
    default = gpu if mx.default_device().type == mx.gpu else "cpu"
    blas = icenet.blas.status()
    return {
        "framework": "MLX",
        "version": VERSION,
        "devices": device_names(gpu, num_gpus),
        "default_device": default,
        "chip": chip(),
        "blas": {"name": blas.name, "path": blas.path, "note": blas.note},
        "matmul_gflops": {"cpu": matmul_gflops(mx.cpu)} | ({gpu: matmul_gflops(mx.gpu)} if num_gpus else {}),
        "small_us": small_operations(),
        "decoding_threads": {
            "of": threads.num_threads(),
            "chosen": threads.choose_num_threads(SMALL_ROWS, SMALL_WIDTH),
        },
        "tf32": precision,
        "dtypes": "fp16 and bf16 products are slow on the CPU: compute in fp32 there; "
        "float64 on the CPU only, not exact for exp, erf, sigmoid and softmax",
    }


def describe(device: str) -> dict[str, str]:
    """Returns framework, version and device for a report of a run on `device`."""
    return {"framework": "MLX", "version": VERSION, "device": device}


def matmul_gflops(device: Any) -> float:
    """Returns the GFLOP/s of an fp32 matrix product on a device."""
    shape = (MATRIX_SIZE, MATRIX_SIZE)
    with mx.stream(device):
        a = mx.random.normal(shape, key=mx.random.key(0))
        b = mx.random.normal(shape, key=mx.random.key(1))
        mx.eval(a, b)
        return measure(lambda: mx.eval(a @ b))


def small_operations() -> dict[str, float]:
    """Returns microseconds of small operations on the CPU (see `Environment.small_us`)."""
    with mx.stream(mx.cpu):
        x, weight = mx.ones((1, SMALL_WIDTH)), mx.ones((4 * SMALL_WIDTH, SMALL_WIDTH))
        values = mx.ones((SMALL_ROWS, 4 * SMALL_WIDTH))
        mx.eval(x, weight, values)
        return {
            "matrix-vector product": microseconds(lambda: mx.eval(x @ weight.T)),
            "elementwise chain": microseconds(lambda: mx.eval((values * mx.sigmoid(values) + 1) * 0.5 - values)),
        }


def tf32(device: mx.Device) -> dict[str, bool]:
    """Returns whether a device has TF32, and whether a config without `allow_tf32` uses it (see `Environment`)."""
    set_tf32(device, False)
    return {"available": has_tf32(device), "used": uses_tf32(device)}


def _gpu_kind() -> str:
    return "cuda" if mx.cuda.is_available() else "metal"
