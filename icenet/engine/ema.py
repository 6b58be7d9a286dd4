"""The moving average of a model's weights, MLX. The mirror is `icenet_torch/engine/ema.py`."""

from __future__ import annotations

from collections.abc import Mapping

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.core.engine import ema
from icenet.models import BaseModel
from icenet.nn import tree


class WeightAverage(ema.WeightAverage):
    """See `icenet.core.engine.ema.WeightAverage`.

    `arrays` stays the same dictionary, because a compiled step captures it.
    """

    def __init__(self, model: BaseModel, decay: float) -> None:
        super().__init__(decay)
        self._parameters = tree.Arrays(model)
        self.arrays = {path: mx.array(array) for path, array in self.current().items()}

    def current(self) -> dict[str, mx.array]:
        return self._parameters.get()

    def update(self, weight: mx.array) -> None:
        for path, array in self.current().items():
            self.arrays[path] = self.arrays[path] + weight * (array - self.arrays[path])

    def assign(self, arrays: Mapping[str, mx.array]) -> None:
        for path in self.arrays:
            self.arrays[path] = arrays[path]

    def _set_weights(self, arrays: Mapping[str, mx.array]) -> None:
        self._parameters.set(arrays)
