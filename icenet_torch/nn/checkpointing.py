"""Gradient checkpointing, PyTorch."""

from __future__ import annotations

import contextlib
from typing import Any

import torch.utils.checkpoint
from torch import nn

from icenet_torch.nn.dropout import Dropout
from icenet_torch.nn.norm import keep_running_statistics


def checkpoint(block: nn.Module, *inputs: object) -> Any:
    """Calls a block without keeping its activations; the backward pass computes them again.

    Both passes use the same dropout masks. Only the first one updates running statistics.
    """
    # Without keys, a dropout draws from PyTorch's generator. Its state is restored for the backward pass.
    unseeded = any(isinstance(m, Dropout) and m.is_active and not m.is_seeded for m in block.modules())
    return torch.utils.checkpoint.checkpoint(
        block,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=unseeded,
        context_fn=lambda: (contextlib.nullcontext(), keep_running_statistics(block)),
    )
