"""What PyTorch is and does on this machine, for `icenet doctor`, which asks in a process of its own."""

from __future__ import annotations

import re
import statistics
import time
from typing import Any

import torch

SIZE = 1024  # of the square matrices timed
SECONDS = 2.5  # after which no further repetition is begun


def environment() -> dict[str, Any]:
    """Version, devices, chip, BLAS, matmul GFLOP/s of each device, TF32, notes on dtypes; JSON types only."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else int(torch.backends.mps.is_available())
    kind = "cuda" if torch.cuda.is_available() else "mps"
    devices = ["cpu"] + ([kind] if gpus == 1 else [f"{kind}:{index}" for index in range(gpus)])
    chip = torch.cuda.get_device_name() if kind == "cuda" else None  # PyTorch does not know the others
    return {
        "framework": "PyTorch",
        "version": torch.__version__,
        "devices": devices,
        "default_device": kind if gpus else "cpu",
        "chip": chip,
        "blas": blas(),
        "matmul_gflops": {"cpu": matmul_gflops("cpu")} | ({kind: matmul_gflops(kind)} if gpus else {}),
        "tf32": tf32(kind if gpus else "cpu"),
        "dtypes": "fp16 and bf16 products are slow on the CPU: compute in fp32 there; no float64 on MPS",
    }


def blas() -> dict[str, Any]:
    """The BLAS that this PyTorch was built with; `path` is None, for it lies inside PyTorch's own library."""
    built_with = torch.__config__.show()
    name = re.search(r"BLAS_INFO=(\w+)", built_with)
    version = re.search(r"Math Kernel Library Version (\S+?)-Product", built_with)
    note = f"MKL {version[1]}" if version else "as built"
    return {"name": name[1] if name else "unknown", "path": None, "note": note}


def matmul_gflops(device: str) -> float:
    """GFLOP/s of one fp32 product of 1024x1024 matrices: the median of 5 after one to warm up."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(SIZE, SIZE, generator=generator).to(device)
    b = torch.randn(SIZE, SIZE, generator=generator).to(device)
    synchronize(a @ b)
    begin, times = time.perf_counter(), list[float]()
    while len(times) < 5 and (not times or time.perf_counter() - begin < SECONDS):
        start = time.perf_counter()
        synchronize(a @ b)
        times.append(time.perf_counter() - start)
    return round(2 * SIZE**3 / statistics.median(times) / 1e9, 1)


def synchronize(array: torch.Tensor) -> None:
    """Wait until `array` is there (PyTorch's GPU calls return before their work is done)."""
    if array.is_cuda:
        torch.cuda.synchronize()
    elif array.device.type == "mps":
        torch.mps.synchronize()


def tf32(device: str) -> dict[str, Any]:
    """Whether fp32 products may run at reduced precision, by which switch, and whether that matters here."""
    enabled = bool(torch.backends.cuda.matmul.allow_tf32)
    convolutions = bool(torch.backends.cudnn.allow_tf32)
    switch = f"torch.backends.cuda.matmul.allow_tf32={enabled}, torch.backends.cudnn.allow_tf32={convolutions}"
    return {"enabled": enabled or convolutions, "matters": device == "cuda", "switch": switch}
