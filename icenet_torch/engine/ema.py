"""A running mean of a model's weights. The mirror is `icenet/engine/ema.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from icenet_torch.models import BaseModel


class WeightAverage:
    """The exponential moving average of a model's trainable weights, fp32.

    Running statistics of a batch norm have no average of their own.
    """

    def __init__(self, model: BaseModel, in_place: bool = False) -> None:
        """`in_place`: others hold on to the memory of the model's weights, so it is filled instead of exchanged."""
        self.model = model
        self.in_place = in_place
        self.arrays = {path: tensor.detach().clone() for path, tensor in self._current().items()}

    def _current(self) -> dict[str, torch.nn.Parameter]:
        return {path: p for path, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """Moves by `weight` of the way to the model's weights."""
        torch._foreach_lerp_(list(self.arrays.values()), list(self._current().values()), weight)

    @torch.no_grad()
    def assign(self, arrays: Mapping[str, torch.Tensor]) -> None:
        """Takes the averages of a checkpoint."""
        for path, tensor in self.arrays.items():
            tensor.copy_(arrays[path])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While it is open, the model has the averages for weights."""
        current = {path: p.data.clone() if self.in_place else p.data for path, p in self._current().items()}
        self._give(self.arrays)
        try:
            yield
        finally:
            self._give(current)

    def _give(self, arrays: Mapping[str, torch.Tensor]) -> None:
        for path, p in self._current().items():
            if self.in_place:
                p.data.copy_(arrays[path])
            else:
                p.data = arrays[path]
