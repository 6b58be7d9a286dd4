"""PyTorch on this machine: version, devices, BLAS, speed, TF32. `icenet doctor` runs it in a separate process."""

from __future__ import annotations

import re
from typing import Any

import torch

from icenet.core.report.environment import MATRIX_SIZE, Environment, device_names
from icenet.core.report.environment import matmul_gflops as measure


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
        "tf32": tf32(default),
        "dtypes": "fp16 and bf16 products are slow on the CPU: compute in fp32 there; no float64 on MPS",
    }


def describe(device: str) -> dict[str, str]:
    """Returns framework, version, device and TF32 (`on` or `off`) for a report of a run on `device`."""
    state = tf32(device.partition(":")[0])
    used = state["enabled"] and state["matters"]
    return {"framework": "PyTorch", "version": torch.__version__, "device": device, "tf32": "on" if used else "off"}


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


def tf32(device: str) -> dict[str, Any]:
    """Returns whether TF32 is enabled, whether a device has it, and the setting (see `Environment.tf32`)."""
    enabled = bool(torch.backends.cuda.matmul.allow_tf32)
    convolutions = bool(torch.backends.cudnn.allow_tf32)
    switch = f"torch.backends.cuda.matmul.allow_tf32={enabled}, torch.backends.cudnn.allow_tf32={convolutions}"
    return {"enabled": enabled or convolutions, "matters": device == "cuda", "switch": switch}


def _gpu_kind() -> str:
    return "cuda" if torch.cuda.is_available() else "mps"


def _wait_for(array: torch.Tensor) -> None:
    """Waits until `array` is computed: GPU kernels run asynchronously."""
    if array.is_cuda:
        torch.cuda.synchronize()
    elif array.device.type == "mps":
        torch.mps.synchronize()
