"""When the operations of a forward pass start, and how many columns it reads, MLX."""

from __future__ import annotations

import contextlib
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array, on_cpu


def start(x: Array) -> None:
    """Starts to compute x on a GPU, while Python describes the operations that follow.

    Otherwise the device waits until the whole graph is made: 1 to 2 ms for 12 layers, a quarter of the time of
    8 x 1024 tokens on an H200. It does nothing where MLX transforms the function (`mx.grad`, `mx.compile`).

    Args:
        x: An array of any shape and dtype.
    """
    if not on_cpu():
        with contextlib.suppress(ValueError):  # of a graph that is being transformed
            mx.async_eval(x)


def cpu_prefill_columns(model: Any) -> int:
    """Returns how many columns of prompts a transformer reads in one pass on a CPU.

    So many that their attention scores stay in the cache of the processor: 512 tokens of 34M parameters in fp32 take
    495 ms in passes of 128, 531 of 256, 580 of 512 (AMD EPYC, one thread). Each pass casts weights of half precision
    and dequantizes packed ones, so these have longer passes.
    """
    return 512 if model.compute_dtype != mx.float32 or model.quantized_layers() else 128
