"""The precision policy, and the loss scale of fp16.

Parameters and optimizer moments are fp32. `training.mixed_precision` is the dtype of activations and matrix products.
Norms, softmax and the loss are always computed in fp32. Both backends follow the same rule: a layer computes in the
dtype of its input, and the embedding returns the compute dtype.

fp16 rounds gradients below 6e-8 to zero. So the loss is scaled up before the backward pass and the gradients are
scaled down after it (Micikevicius et al., "Mixed precision training", 2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from icenet.core.config import Config
from icenet.core.errors import CheckpointError
from icenet.core.runs.checkpoint import Checkpoint

GROWTH_INTERVAL = 2000
"""Number of steps without overflow after which the scale is doubled."""
MAX_SCALE = 2.0**24


@dataclass
class LossScale:
    """A dynamic loss scale.

    It is halved after an overflow, whose step is skipped, and doubled after GROWTH_INTERVAL steps without one.
    """

    scale: float = 1.0
    good_steps: int = 0
    """Steps without overflow since the last change."""

    @classmethod
    def for_precision(cls, mixed_precision: str) -> LossScale:
        """Returns the initial scale: 2^16 for fp16; 1, which never changes, for dtypes with the range of fp32."""
        return cls(2.0**16 if mixed_precision == "fp16" else 1.0)

    @classmethod
    def read(cls, stored: Any) -> LossScale:
        """Returns the entry `loss_scale` of a checkpoint's state.json.

        Raises:
            ValueError: It is absent or invalid.
        """
        if not isinstance(stored, Mapping):
            raise ValueError("no loss scale")
        try:
            return cls(float(stored["scale"]), int(stored["good_steps"]))
        except (KeyError, TypeError) as error:
            raise ValueError("not a loss scale") from error

    @classmethod
    def of_checkpoint(cls, found: Checkpoint, config: Config) -> LossScale:
        """Returns the loss scale with which a run continues: the initial one if the precision is another.

        Raises:
            CheckpointError: The checkpoint has no valid one.
        """
        precision = config.training.mixed_precision
        if precision != found.config.training.mixed_precision:
            return cls.for_precision(precision)
        try:
            return cls.read(found.state.get("loss_scale"))
        except ValueError:
            raise CheckpointError(f"{found.path / 'state.json'}: damaged: it has no valid loss_scale") from None

    def update(self, finite: bool) -> None:
        """Adjusts the scale after a step.

        Args:
            finite: Whether all gradients of the step were finite.
        """
        if not finite:
            self.scale, self.good_steps = max(self.scale / 2, 1.0), 0
            return
        self.good_steps += 1
        if self.good_steps >= GROWTH_INTERVAL:
            self.scale, self.good_steps = min(self.scale * 2, MAX_SCALE), 0
