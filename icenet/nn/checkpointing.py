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
    """The block's output, its activations computed anew in the backward pass instead of kept.

    Running statistics move in the forward pass only.
    """
    passes = 0
    # a dropout without a key would draw another mask the second time: it is lent one
    unkeyed = [m for m in block.modules() if isinstance(m, Dropout) and m._keys is None and m.training and m.p > 0]
    keys = [mx.random.randint(0, 2**31 - 1, (1, 2)).astype(mx.uint32) for _ in unkeyed]

    def run(*arguments: object) -> Array:
        nonlocal passes
        passes += 1
        for module, key in zip(unkeyed, keys, strict=True):
            module._keys = key
        try:
            with contextlib.nullcontext() if passes == 1 else keep_running_statistics(block):
                return block(*arguments)
        finally:
            for module in unkeyed:
                module._keys = None

    return nn.utils.checkpoint(block, run)(*inputs)
