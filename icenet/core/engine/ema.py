"""The moving average of a model's weights: the base class of the backends' implementations."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from icenet.core.engine.batches import Array


class WeightAverage(ABC):
    """The exponential moving average of a model's trainable weights, in their dtype.

    Running statistics of batch norms are not averaged.

    Attributes:
        decay: The value of `training.ema_decay`.
        arrays: The averages by parameter path, in the framework's layouts. They start as the current weights.
    """

    arrays: dict[str, Array]

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def weight(self, step: int) -> float:
        """Returns the fraction by which step 0, 1, ... moves the averages towards the weights."""
        return ema_weight(step, self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Sets the model's weights to the averages during the block."""
        weights = self._saved()
        self._set_weights(self.arrays)
        try:
            yield
        finally:
            self._set_weights(weights)

    @abstractmethod
    def current(self) -> dict[str, Array]:
        """Returns the model's trainable weights by path."""

    @abstractmethod
    def update(self, weight: Any) -> None:
        """Moves the averages towards the model's weights by the fraction `weight` of the difference."""

    @abstractmethod
    def assign(self, arrays: Mapping[str, Array]) -> None:
        """Sets the averages."""

    def _saved(self) -> dict[str, Array]:
        """Returns the model's weights as arrays that `_set_weights` does not overwrite."""
        return self.current()

    @abstractmethod
    def _set_weights(self, arrays: Mapping[str, Array]) -> None:
        """Sets the model's trainable weights."""


def ema_weight(step: int, decay: float) -> float:
    """Returns the weight of the new parameters in their exponential moving average, after step 0, 1, ...

    It is 1 - decay. The decay of step t is at most (1 + t) / (10 + t), as in TensorFlow's ExponentialMovingAverage,
    so that the average soon forgets the initial parameters.
    """
    return 1 - min(decay, (1 + step) / (10 + step))
