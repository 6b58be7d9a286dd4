"""Gradient checkpointing, PyTorch."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from icenet_torch.nn.dropout import Dropout
from icenet_torch.nn.norm import keep_running_statistics


def checkpoint(block: nn.Module, *inputs: object) -> Any:
    """The block's output, its activations computed anew in the backward pass instead of kept.

    Running statistics move in the forward pass only.
    """
    # a dropout without a key draws from PyTorch's generator, whose state is put back for the second time
    unkeyed = any(isinstance(m, Dropout) and m._keys is None and m.training and m.p > 0 for m in block.modules())
    return torch.utils.checkpoint.checkpoint(
        block,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=unkeyed,
        context_fn=lambda: (contextlib.nullcontext(), keep_running_statistics(block)),
    )
