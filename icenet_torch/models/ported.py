"""A PyTorch module with a port as a model, PyTorch: the original. The mirror is `icenet/models/ported.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from icenet.core.config import ModelConfig, custom
from icenet.core.models.ported import PortedBase, logits_of
from icenet_torch.models.base import BaseModel
from icenet_torch.porting import sources


class PortedModel(PortedBase, BaseModel):
    """A module of the user. `net` is the original."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.net = _module(config)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = logits_of(self.net(inputs), self.config, torch.Tensor)
        return found

    @property
    def code(self) -> str:
        return type(self.net).__module__


def _module(config: Any) -> nn.Module:
    """Returns the module that `type` names."""
    return sources.instance(custom.original_of(config.type), config.type)
