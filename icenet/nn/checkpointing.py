"""Gradient checkpointing, MLX."""

from __future__ import annotations

from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.core.errors import UsageError
from icenet.core.nn.dropout import KeyedCalls, count_calls, repeated_calls
from icenet.nn.arrays import Array
from icenet.nn.norm import keep_buffers


def checkpoint(block: nn.Module, *inputs: object) -> Any:
    """Calls a block without keeping its activations; the backward pass computes them again.

    Both passes use the same dropout masks. Only the first one updates buffers, such as running
    statistics.

    Args:
        block: The module.
        inputs: Its arguments: arrays, or other values that it takes.

    Returns:
        What the block returns.

    Raises:
        UsageError: The block draws from MLX's generator, whose state cannot be restored for the backward pass.
    """
    state: Any = mx.random.state
    passes = 0
    dropouts = [module for module in block.modules() if isinstance(module, KeyedCalls)]
    calls = count_calls(dropouts)
    # Without keys, a dropout would draw another mask in the backward pass. It gets temporary keys.
    unseeded = [module for module in dropouts if module.is_active and not module.is_seeded]
    keys = [mx.random.randint(0, 2**31 - 1, (1, 2)).astype(mx.uint32) for _ in unseeded]

    def run(*arguments: object) -> Array:
        nonlocal passes
        passes += 1
        for module, key in zip(unseeded, keys, strict=True):
            module.seed(key)
        before = state[0]  # each draw replaces the array
        try:
            if passes == 1:
                outputs = block(*arguments)
            else:
                with repeated_calls(dropouts, calls), keep_buffers(block):
                    outputs = block(*arguments)
        finally:
            for module in unseeded:
                module.seed(None)
        if state[0] is not before:
            raise UsageError(
                f"{type(block).__name__} draws random numbers that MLX cannot draw again in the backward pass of "
                "gradient checkpointing: use nn.Dropout, or set training.gradient_checkpointing to false"
            )
        return outputs

    return nn.utils.checkpoint(block, run)(*inputs)
