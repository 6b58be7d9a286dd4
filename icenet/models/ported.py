"""A module of the user with a port as a model: the original on PyTorch, its port on MLX."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.core.config import ModelConfig
from icenet.core.models.ported import PortedBase
from icenet.models.base import BaseModel
from icenet.porting import trained


class PortedModel(PortedBase, BaseModel):
    """A module of the user: the original on PyTorch, its port on MLX."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.net = trained.module(config)

    def forward(self, inputs: mx.array) -> mx.array:
        return trained.logits(self.net, inputs, self.config)

    @property
    def code(self) -> str:
        return trained.code(self)
