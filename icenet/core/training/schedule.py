"""Learning rate schedules: pure functions of the step, computed on the host in float64.

Computed in MLX's graph, in fp32, a schedule has an error of 1e-6 to 1e-5.
"""

from __future__ import annotations

import math

from icenet.core.config import TrainingConfig


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Returns the learning rate of step 0, 1, ..., before the factor of a parameter group.

    It rises linearly over `warmup_steps` to `learning_rate`. After that it is at least `min_learning_rate` and

        constant       stays the same
        linear         falls linearly to `min_learning_rate` at the last step
        cosine         falls along half a cosine to `min_learning_rate` at the last step (Loshchilov and Hutter, 2017,
                       without restarts)
        step           is multiplied by `decay_factor` every `decay_every` steps
        exponential    is multiplied by `decay_factor` ^ (1 / `decay_every`) in every step
        inverse_sqrt   is proportional to 1 / sqrt(step + 1) (Vaswani et al., 2017)
        wsd            stays the same, then falls linearly over the last `decay_steps` steps to `min_learning_rate`
                       (warmup, stable, decay; Hu et al., 2024, whose decay is exponential)

    The last step is that of the schedule: `schedule_steps`, by default `max_steps`. After it the learning rate stays.

    A warmup longer than the run ends with the run. A decay longer than the steps after the warmup is shortened.
    """
    peak, least, warmup = training.learning_rate, training.min_learning_rate, training.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    steps = length(training)
    if training.schedule != "inverse_sqrt":
        step = min(step, max(steps - 1, warmup))
    since = step - warmup
    if training.schedule == "constant":
        return peak
    if training.schedule in ("step", "exponential"):
        every = training.decay_every or max(steps // 10, 1)
        times = since // every if training.schedule == "step" else since / every
        return max(peak * training.decay_factor**times, least)
    if training.schedule == "inverse_sqrt":
        return max(peak * math.sqrt(max(warmup, 1) / (step + 1)), least)
    if training.schedule == "wsd":
        start = decay_start(training)
        if start is None or step < start:
            return peak
        share = max(1 - (step + 1 - start) / (steps - start), 0.0)
        return peak * share + least * (1 - share)
    progress = min(since / max(steps - 1 - warmup, 1), 1.0)
    share = 1 - progress if training.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * share + least * (1 - share)  # exact at both ends


def length(training: TrainingConfig) -> int:
    """Returns the number of steps of the schedule."""
    return training.schedule_steps or training.max_steps


def explain_change(step: int, before: TrainingConfig, after: TrainingConfig) -> str | None:
    """Returns a note if another number of steps changes the learning rate of a run that continues; None if not.

    Args:
        step: Number of completed steps.
        before, after: The settings of the run so far, and of its continuation.
    """
    steps = length(before)
    fixed = after.schedule in ("step", "exponential") and after.decay_every is not None
    if steps == length(after) or before.schedule != after.schedule or fixed:
        return None
    rate, kept = (
        learning_rate(step, training) for training in (after, after.model_copy(update={"schedule_steps": steps}))
    )
    if abs(rate - kept) <= 0.01 * max(rate, kept):
        return None
    return (
        f"the {after.schedule} schedule has {length(after)} steps instead of {steps}, so the learning rate of step "
        f"{step + 1} is {rate:.3g} instead of {kept:.3g}; --set training.schedule_steps={steps} keeps the schedule"
    )


def decay_start(training: TrainingConfig) -> int | None:
    """Returns the number of steps before the decay of schedule wsd; None for other schedules or without a decay."""
    if training.schedule != "wsd":
        return None
    steps = length(training)
    decay = steps // 5 if training.decay_steps is None else training.decay_steps
    start = max(steps - decay, training.warmup_steps)
    return start if start < steps else None


def adam_corrections(step: int, beta1: float, beta2: float) -> tuple[float, float]:
    """Returns the bias corrections of both moments, 1 - beta^(step + 1) (Kingma and Ba, 2015)."""
    return 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)


def adafactor_scalars(step: int, learning_rate: float) -> tuple[float, float]:
    """Returns 1 - the decay rate of Adafactor's second moment, (step + 1)^-0.8, and its relative step size.

    The relative step size is min(learning_rate, 1 / sqrt(step + 1)) (Shazeer and Stern, 2018, sections 7 and 8, where
    the learning rate is 0.01).
    """
    return (step + 1) ** -0.8, min(learning_rate, (step + 1) ** -0.5)
