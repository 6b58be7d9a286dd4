"""Results of the steps of an engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

MAX_LARGEST = 3
"""Number of parameters in `StepResult.largest`."""


class StepResult(NamedTuple):
    """Loss, gradient norm and status of one training step."""

    loss: float
    """Mean loss in nats."""
    grad_norm: float
    """Norm of all gradients together, before clipping."""
    finite: bool
    """Whether loss and gradient norm are finite."""
    stop: str | None = None
    """Reason to stop that one of several processes received (see `processes.SIGNALS`); the same in all, or None."""
    largest: tuple[tuple[str, float], ...] = ()
    """If not finite: the parameters with the largest gradients, and the norms of these."""


class Evaluation(NamedTuple):
    """Loss and accuracy of one batch in evaluation mode."""

    loss: float
    """Mean loss in nats."""
    labels: int
    """Number of labels counted."""
    correct: int | None
    """Number of rows classified correctly if labels are `[B]`; None for tokens."""


def step_result(
    loss: float, grad_norm: float, stop: str | None, norms: Callable[[], Mapping[str, float]]
) -> StepResult:
    """Returns the result of a step. `norms` returns each gradient's norm; it is called only if one is not finite."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return StepResult(loss, grad_norm, True, stop)
    ranked = sorted(norms().items(), key=lambda item: (not math.isnan(item[1]), -item[1]))
    return StepResult(loss, grad_norm, False, stop, tuple(ranked[:MAX_LARGEST]))
