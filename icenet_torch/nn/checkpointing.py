"""Gradient checkpointing, PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.utils.checkpoint
from torch import nn

from icenet.core.nn.dropout import KeyedCalls, count_calls, repeated_calls
from icenet_torch.nn.norm import keep_buffers


def checkpoint(block: nn.Module, *inputs: object) -> Any:
    """Calls a block without keeping its activations; the backward pass computes them again.

    Both passes use the same random numbers. Only the first one updates buffers, such as running
    statistics.

    Args:
        block: The module.
        inputs: Its arguments: arrays, or other values that it takes.

    Returns:
        What the block returns.
    """
    dropouts = [module for module in block.modules() if isinstance(module, KeyedCalls)]
    calls = count_calls(dropouts)

    @contextlib.contextmanager
    def recomputation() -> Iterator[None]:
        with repeated_calls(dropouts, calls), keep_buffers(block):
            yield

    return torch.utils.checkpoint.checkpoint(
        block,
        *inputs,
        use_reentrant=False,
        # Without keys, layers draw from PyTorch's generator. Its state is restored for the backward pass.
        preserve_rng_state=not any(dropout.is_seeded for dropout in dropouts),
        context_fn=lambda: (contextlib.nullcontext(), recomputation()),
    )
