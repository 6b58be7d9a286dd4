"""A running mean of a model's weights. The mirror is `icenet_torch/engine/ema.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from icenet.models import BaseModel


class WeightAverage:
    """The exponential moving average of a model's trainable weights, fp32.

    Running statistics of a batch norm have no average of their own.
    """

    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.arrays = {path: mx.array(array) for path, array in self._current().items()}

    def _current(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self.model.trainable_parameters()))

    def update(self, weight: mx.array) -> None:
        """Moves by `weight` of the way to the model's weights, in place: a compiled step holds on to `arrays`."""
        for path, array in self._current().items():
            self.arrays[path] = self.arrays[path] + weight * (array - self.arrays[path])

    def assign(self, arrays: Mapping[str, mx.array]) -> None:
        """Takes the averages of a checkpoint."""
        for path in self.arrays:
            self.arrays[path] = arrays[path]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While it is open, the model has the averages for weights."""
        current = self._current()
        self.model.update(tree_unflatten(list(self.arrays.items())))
        try:
            yield
        finally:
            self.model.update(tree_unflatten(list(current.items())))
