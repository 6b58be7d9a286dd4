"""What MLX is and does on this machine, for `icenet doctor`, which asks in a process of its own."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from typing import Any

import icenet.blas

import mlx.core as mx

SIZE = 1024  # of the square matrices timed
SECONDS = 2.5  # after which no further repetition is begun: the reference BLAS takes up to 0.7 s for each


def environment() -> dict[str, Any]:
    """Version, devices, chip, BLAS, matmul GFLOP/s of each device, TF32, notes on dtypes; JSON types only."""
    gpus = mx.device_count(mx.gpu) if mx.is_available(mx.gpu) else 0
    kind = "cuda" if mx.cuda.is_available() else "metal"
    devices = ["cpu"] + ([kind] if gpus == 1 else [f"{kind}:{index}" for index in range(gpus)])
    on_gpu = mx.default_device().type == mx.gpu
    chip = str(mx.device_info().get("device_name", platform.processor()))
    blas = icenet.blas.status()
    return {
        "framework": "MLX",
        "version": mx.__version__,  # type: ignore[attr-defined]  # its stub lacks it
        "devices": devices,
        "default_device": kind if on_gpu else "cpu",
        "chip": chip,
        "blas": {"name": blas.name, "path": blas.path, "note": blas.note},
        "matmul_gflops": {"cpu": matmul_gflops(mx.cpu)} | ({kind: matmul_gflops(mx.gpu)} if gpus else {}),
        "tf32": tf32(kind if on_gpu else "cpu", chip),
        "dtypes": "fp16 and bf16 products are slow on the CPU: compute in fp32 there; "
        "float64 on the CPU only, not exact for exp, erf, sigmoid and softmax",
    }


def matmul_gflops(device: Any) -> float:
    """GFLOP/s of one fp32 product of 1024x1024 matrices: the median of 5 after one to warm up."""
    with mx.stream(device):
        a = mx.random.normal((SIZE, SIZE), key=mx.random.key(0))
        b = mx.random.normal((SIZE, SIZE), key=mx.random.key(1))
        mx.eval(a, b, a @ b)
        begin, times = time.perf_counter(), list[float]()
        while len(times) < 5 and (not times or time.perf_counter() - begin < SECONDS):
            start = time.perf_counter()
            mx.eval(a @ b)
            times.append(time.perf_counter() - start)
    return round(2 * SIZE**3 / statistics.median(times) / 1e9, 1)


def tf32(device: str, chip: str) -> dict[str, Any]:
    """Whether fp32 products may run at reduced precision, by which switch, and whether that matters here."""
    value = os.environ.get("MLX_ENABLE_TF32", "")
    generation = re.search(r"Apple M(\d+)", chip)
    matters = device == "cuda" or (device == "metal" and generation is not None and int(generation[1]) >= 5)
    return {
        "enabled": value != "0",
        "matters": matters,
        "switch": f"MLX_ENABLE_TF32={value or '1 (default)'}",
    }
