"""A module of the user with a port as a model: the original on PyTorch, its port on MLX."""

from __future__ import annotations

import torch

from icenet.core.config import ModelConfig
from icenet.core.models.ported import PortedBase
from icenet_torch.models.base import BaseModel
from icenet_torch.porting import trained


class PortedModel(PortedBase, BaseModel):
    """A module of the user: the original on PyTorch, its port on MLX."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.net = trained.module(config)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return trained.logits(self.net, inputs, self.config)

    @property
    def code(self) -> str:
        return trained.code(self)
