"""PyTorch on this machine: version, devices, BLAS, speed, TF32. `icenet doctor` runs it in a separate process."""

from __future__ import annotations

import re
from typing import Any

import torch

from icenet.core.report.environment import (
    MATRIX_SIZE,
    SMALL_ROWS,
    SMALL_WIDTH,
    Environment,
    device_names,
    microseconds,
)
from icenet.core.report.environment import matmul_gflops as measure
from icenet_torch.nn import arithmetic
from icenet_torch.tools import threads


def environment() -> Environment:
    """Returns the description that `icenet doctor` shows (about 1 s: it times matrix products)."""
    gpu = _gpu_kind()
    num_gpus = torch.cuda.device_count() if gpu == "cuda" else int(torch.backends.mps.is_available())
    default = gpu if num_gpus else "cpu"
    return {
        "framework": "PyTorch",
        "version": torch.__version__,
        "devices": device_names(gpu, num_gpus),
        "default_device": default,
        "chip": torch.cuda.get_device_name() if gpu == "cuda" else None,  # PyTorch reports no other names
        "blas": _blas(),
        "matmul_gflops": {"cpu": matmul_gflops("cpu")} | ({gpu: matmul_gflops(gpu)} if num_gpus else {}),
        "small_us": small_operations(),
        "decoding_threads": {
            "of": threads.num_threads(),
            "chosen": threads.choose_num_threads(SMALL_ROWS, SMALL_WIDTH),
        },
        "tf32": tf32(torch.device(default)),
        "dtypes": "fp16 and bf16 products are slow on the CPU: compute in fp32 there; no float64 on MPS",
    }


def describe(device: str) -> dict[str, str]:
    """Returns framework, version and device for a report of a run on `device`."""
    return {"framework": "PyTorch", "version": torch.__version__, "device": device}


def _blas() -> dict[str, Any]:
    """Returns the BLAS that PyTorch was built with. `path` is None: the BLAS is part of PyTorch's own library."""
    built_with = torch.__config__.show()
    name = re.search(r"BLAS_INFO=(\w+)", built_with)
    version = re.search(r"Math Kernel Library Version (\S+?)-Product", built_with)
    note = f"MKL {version[1]}" if version else "as built"
    return {"name": name[1] if name else "unknown", "path": None, "note": note}


def matmul_gflops(device: str) -> float:
    """Returns the GFLOP/s of an fp32 matrix product on a device."""
    shape, generator = (MATRIX_SIZE, MATRIX_SIZE), torch.Generator().manual_seed(0)
    a = torch.randn(shape, generator=generator).to(device)
    b = torch.randn(shape, generator=generator).to(device)
    return measure(lambda: _wait_for(a @ b))


@torch.inference_mode()
def small_operations() -> dict[str, float]:
    """Returns microseconds of small operations on the CPU (see `Environment.small_us`)."""
    x, weight = torch.ones(1, SMALL_WIDTH), torch.ones(4 * SMALL_WIDTH, SMALL_WIDTH)
    values = torch.ones(SMALL_ROWS, 4 * SMALL_WIDTH)
    return {
        "matrix-vector product": microseconds(lambda: x @ weight.T),
        "elementwise chain": microseconds(lambda: (values * torch.sigmoid(values) + 1) * 0.5 - values),
    }


def tf32(device: torch.device) -> dict[str, bool]:
    """Returns whether a device has TF32, and whether a config without `allow_tf32` uses it (see `Environment`)."""
    with arithmetic.tf32(False):
        return {"available": arithmetic.has_tf32(device), "used": arithmetic.uses_tf32(device)}


def _gpu_kind() -> str:
    return "cuda" if torch.cuda.is_available() else "mps"


def _wait_for(array: torch.Tensor) -> None:
    """Waits until `array` is computed: GPU kernels run asynchronously."""
    if array.is_cuda:
        torch.cuda.synchronize()
    elif array.device.type == "mps":
        torch.mps.synchronize()
