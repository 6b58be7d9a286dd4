"""MLX on this machine: version, devices, BLAS, speed, TF32. `icenet doctor` runs it in a separate process."""

from __future__ import annotations

import os
import platform
import re
from typing import Any

import icenet.blas

import mlx.core as mx

from icenet.core.report.environment import MATRIX_SIZE, Environment, device_names
from icenet.core.report.environment import matmul_gflops as measure

VERSION: str = mx.__version__  # type: ignore[attr-defined]  # missing in the type stub


def environment() -> Environment:
    """Returns the description that `icenet doctor` shows (about 1 s: it times matrix products)."""
    num_gpus = mx.device_count(mx.gpu) if mx.is_available(mx.gpu) else 0
    gpu = _gpu_kind()
    default = gpu if mx.default_device().type == mx.gpu else "cpu"
    blas = icenet.blas.status()
    return {
        "framework": "MLX",
        "version": VERSION,
        "devices": device_names(gpu, num_gpus),
        "default_device": default,
        "chip": _chip(),
        "blas": {"name": blas.name, "path": blas.path, "note": blas.note},
        "matmul_gflops": {"cpu": matmul_gflops(mx.cpu)} | ({gpu: matmul_gflops(mx.gpu)} if num_gpus else {}),
        "tf32": tf32(default, _chip()),
        "dtypes": "fp16 and bf16 products are slow on the CPU: compute in fp32 there; "
        "float64 on the CPU only, not exact for exp, erf, sigmoid and softmax",
    }


def describe(device: str) -> dict[str, str]:
    """Returns framework, version, device and TF32 (`on` or `off`) for a report of a run on `device`."""
    state = tf32("cpu" if device == "cpu" else _gpu_kind(), _chip())
    used = state["enabled"] and state["matters"]
    return {"framework": "MLX", "version": VERSION, "device": device, "tf32": "on" if used else "off"}


def matmul_gflops(device: Any) -> float:
    """Returns the GFLOP/s of an fp32 matrix product on a device."""
    shape = (MATRIX_SIZE, MATRIX_SIZE)
    with mx.stream(device):
        a = mx.random.normal(shape, key=mx.random.key(0))
        b = mx.random.normal(shape, key=mx.random.key(1))
        mx.eval(a, b)
        return measure(lambda: mx.eval(a @ b))


def tf32(device: str, chip: str) -> dict[str, Any]:
    """Returns whether TF32 is enabled, whether a device has it, and the setting (see `Environment.tf32`)."""
    value = os.environ.get("MLX_ENABLE_TF32", "")
    generation = re.search(r"Apple M(\d+)", chip)
    matters = device == "cuda" or (device == "metal" and generation is not None and int(generation[1]) >= 5)
    return {
        "enabled": value != "0",
        "matters": matters,
        "switch": f"MLX_ENABLE_TF32={value or '1 (default)'}",
    }


def _gpu_kind() -> str:
    return "cuda" if mx.cuda.is_available() else "metal"


def _chip() -> str:
    return str(mx.device_info().get("device_name", platform.processor()))
