"""The description of a backend on this machine that `icenet doctor` shows: its fields, and the matmul benchmark."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, TypedDict

MATRIX_SIZE = 1024
REPETITIONS = 5
MAX_SECONDS = 2.5
"""No repetition starts after this time: with a reference BLAS each takes up to 0.7 s."""


class Environment(TypedDict):
    """A framework on this machine, in JSON types. Both backends return it from `tools.environment.environment()`."""

    framework: str
    version: str
    devices: list[str]
    """`cpu`, and the GPUs: `cuda`, `metal` or `mps`, numbered (`cuda:0`) where there are several."""
    default_device: str
    chip: str | None
    """Name of the processor or GPU; None if the framework does not report it."""
    blas: dict[str, Any]
    """`name`, `path` and `note` of the BLAS used on the CPU."""
    matmul_gflops: dict[str, float]
    """GFLOP/s of an fp32 matrix product, by kind of device."""
    tf32: dict[str, bool]
    """`available`: the default device has TF32. `used`: fp32 products use it although `allow_tf32` is false."""
    dtypes: str
    """Limitations of dtypes, as text."""


def device_names(gpu: str, num_gpus: int) -> list[str]:
    """Returns `cpu` and the names of the GPUs, numbered if there are several."""
    return ["cpu", *([gpu] if num_gpus == 1 else [f"{gpu}:{index}" for index in range(num_gpus)])]


def matmul_gflops(multiply: Callable[[], Any]) -> float:
    """Returns the GFLOP/s of one product of square matrices: the median of 5 repetitions after a warm-up.

    Args:
        multiply: Multiplies two matrices of MATRIX_SIZE x MATRIX_SIZE and waits for the result.
    """
    multiply()
    begin, times = time.perf_counter(), list[float]()
    while len(times) < REPETITIONS and (not times or time.perf_counter() - begin < MAX_SECONDS):
        start = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - start)
    return round(2 * MATRIX_SIZE**3 / statistics.median(times) / 1e9, 1)
