"""Training steps whose loss or gradients are not finite: which of them are skipped, and which end a run."""

from __future__ import annotations

import math

from icenet.core.config import TrainingConfig
from icenet.core.engine import StepResult
from icenet.core.errors import IceNetError

MAX_SKIPPED_STEPS = 10
"""Number of steps in a row without a finite gradient that ends a run even with `training.on_nan: skip`."""


class SkippedSteps:
    """Counts the steps in a row without a finite gradient."""

    def __init__(self, training: TrainingConfig) -> None:
        self._training = training
        self._in_a_row = 0

    def count(self, result: StepResult, loss_scale: float) -> bool:
        """Counts a step.

        Args:
            result: The result of the step.
            loss_scale: The loss scale of the step. An overflow of fp16 is skipped until the scale is 1.

        Returns:
            Whether training continues: the step is finite or may be skipped.
        """
        if result.finite:
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        if self._training.mixed_precision == "fp16" and math.isfinite(result.loss) and loss_scale > 1:
            return True
        return self._training.on_nan == "skip" and self._in_a_row < MAX_SKIPPED_STEPS

    def error(self, step: int, result: StepResult, last_good: str) -> IceNetError:
        """Returns the error for a step that may not be skipped.

        Args:
            step: Number of the step, from 1.
            result: Its result.
            last_good: A sentence on the last checkpoint before it.
        """
        repeated = f", {self._in_a_row} times in a row" if self._in_a_row > 1 else ""
        largest = ", ".join(f"{path} {norm:.3g}" for path, norm in result.largest)
        ways = ", raise training.warmup_steps, or skip such steps with training.on_nan=skip"
        if self._training.on_nan == "skip":
            ways = " or raise training.warmup_steps"
        return IceNetError(
            f"step {step}: the loss is {result.loss} and the gradient norm {result.grad_norm}{repeated} "
            f"(largest: {largest}); {last_good}. Lower training.learning_rate{ways}"
        )
