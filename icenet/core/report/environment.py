"""The description of a backend on this machine that `icenet doctor` shows: its fields, and the matmul benchmark."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, TypedDict

MATRIX_SIZE = 1024
REPETITIONS = 5
SMALL_WIDTH = 512
"""Width of the small products: those of a decoding step with a batch of 8, `[8, 512] x [512, 2048]`."""
SMALL_ROWS = 8
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
    small_us: dict[str, float]
    """Microseconds on the CPU: a matrix-vector product and a chain of elementwise operations, as in decoding."""
    decoding_threads: dict[str, int | None]
    """`chosen`: the number of threads that `icenet generate` would use for small products. `of`: of how many."""
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
    return round(2 * MATRIX_SIZE**3 / _median_seconds(multiply, REPETITIONS, MAX_SECONDS) / 1e9, 1)


def microseconds(work: Callable[[], Any]) -> float:
    """Returns the duration of a small operation: the median of up to 50 repetitions in 0.2 s, after a warm-up."""
    return round(_median_seconds(work, 50, 0.2) * 1e6, 1)


def _median_seconds(work: Callable[[], Any], most: int, seconds: float) -> float:
    """Returns the median duration of a function after a warm-up: of `most` calls, or of those begun in `seconds`."""
    work()
    begin, times = time.perf_counter(), list[float]()
    while len(times) < most and (not times or time.perf_counter() - begin < seconds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
