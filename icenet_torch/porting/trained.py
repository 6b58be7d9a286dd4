"""The original of a model that is trained (`icenet_torch.models.ported`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from icenet.core.config import custom
from icenet.core.models.ported import logits_of
from icenet_torch.porting import sources


def module(config: Any) -> nn.Module:
    """Returns the module that `type` names."""
    return sources.instance(custom.original_of(config.type), config.type)


def logits(net: nn.Module, inputs: torch.Tensor, config: Any) -> torch.Tensor:
    """Returns the logits of the module, for token ids or images `[B, C, H, W]`."""
    found: torch.Tensor = logits_of(net(inputs), config, torch.Tensor)
    return found


def code(model: Any) -> str:
    """Returns the module of Python that defines the model: that of the user's module."""
    return type(model.net).__module__
