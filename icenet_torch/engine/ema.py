"""The moving average of a model's weights, PyTorch. The mirror is `icenet/engine/ema.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from icenet.core.engine import ema


class WeightAverage(ema.WeightAverage):
    """See `icenet.core.engine.ema.WeightAverage`.

    Args:
        model: The model, or this process's shards of its parameters.
        decay: The value of `training.ema_decay`.
        in_place: Copy the averages into the memory of the weights instead of exchanging tensors, for parameters
            whose memory is shared with others.
    """

    def __init__(self, model: Any, decay: float, in_place: bool = False) -> None:
        super().__init__(decay)
        self.model = model
        self.in_place = in_place
        self.arrays = {path: tensor.clone() for path, tensor in self.current().items()}

    def current(self) -> dict[str, torch.Tensor]:
        return {path: p.data for path, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, weight: float) -> None:
        torch._foreach_lerp_(list(self.arrays.values()), list(self.current().values()), weight)

    @torch.no_grad()
    def assign(self, arrays: Mapping[str, torch.Tensor]) -> None:
        for path, tensor in self.arrays.items():
            tensor.copy_(arrays[path])

    def _saved(self) -> dict[str, torch.Tensor]:
        weights = self.current()
        return {path: tensor.clone() for path, tensor in weights.items()} if self.in_place else weights

    def _set_weights(self, arrays: Mapping[str, torch.Tensor]) -> None:
        for path, p in self.model.named_parameters():
            if not p.requires_grad:
                continue
            if self.in_place:
                p.data.copy_(arrays[path])
            else:
                p.data = arrays[path]
