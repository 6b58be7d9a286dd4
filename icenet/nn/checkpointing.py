"""Gradient checkpointing, MLX."""

from __future__ import annotations

import contextlib
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.nn.arrays import Array
from icenet.nn.dropout import Dropout
from icenet.nn.norm import keep_running_statistics


def checkpoint(block: nn.Module, *inputs: object) -> Any:
    """Calls a block without keeping its activations; the backward pass computes them again.

    Both passes use the same dropout masks. Only the first one updates running statistics.
    """
    passes = 0
    # Without keys, a dropout would draw another mask in the backward pass. It gets temporary keys.
    unseeded = [m for m in block.modules() if isinstance(m, Dropout) and m.is_active and not m.is_seeded]
    keys = [mx.random.randint(0, 2**31 - 1, (1, 2)).astype(mx.uint32) for _ in unseeded]

    def run(*arguments: object) -> Array:
        nonlocal passes
        passes += 1
        for module, key in zip(unseeded, keys, strict=True):
            module.seed(key)
        try:
            with contextlib.nullcontext() if passes == 1 else keep_running_statistics(block):
                return block(*arguments)
        finally:
            for module in unseeded:
                module.seed(None)

    return nn.utils.checkpoint(block, run)(*inputs)
