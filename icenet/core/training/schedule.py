"""Learning rate schedules and other scalars that are pure functions of the step, computed on the host in float64.

Computed in MLX's graph, in fp32, a schedule has an error of 1e-6 to 1e-5, and a bias correction a larger one.
"""

from __future__ import annotations

import math

from icenet.core.config import TrainingConfig


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Returns the learning rate of step 0, 1, ... max_steps - 1, before the factor of a parameter group.

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

    A warmup longer than the run ends with the run. A decay longer than the steps after the warmup is shortened.
    """
    peak, least, warmup = training.learning_rate, training.min_learning_rate, training.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    since = step - warmup
    if training.schedule == "constant":
        return peak
    if training.schedule in ("step", "exponential"):
        every = training.decay_every or max(training.max_steps // 10, 1)
        times = since // every if training.schedule == "step" else since / every
        return max(peak * training.decay_factor**times, least)
    if training.schedule == "inverse_sqrt":
        return max(peak * math.sqrt(max(warmup, 1) / (step + 1)), least)
    if training.schedule == "wsd":
        start = decay_start(training)
        if start is None or step < start:
            return peak
        share = max(1 - (step + 1 - start) / (training.max_steps - start), 0.0)
        return peak * share + least * (1 - share)
    progress = min(since / max(training.max_steps - 1 - warmup, 1), 1.0)
    share = 1 - progress if training.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * share + least * (1 - share)  # exact at both ends


def decay_start(training: TrainingConfig) -> int | None:
    """Returns the number of steps before the decay of schedule wsd; None for other schedules or without a decay."""
    if training.schedule != "wsd":
        return None
    length = training.max_steps // 5 if training.decay_steps is None else training.decay_steps
    start = max(training.max_steps - length, training.warmup_steps)
    return start if start < training.max_steps else None


def adam_corrections(step: int, beta1: float, beta2: float) -> tuple[float, float]:
    """Returns the bias corrections of both moments, 1 - beta^(step + 1) (Kingma and Ba, 2015)."""
    return 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)


def adafactor_scalars(step: int, learning_rate: float) -> tuple[float, float]:
    """Returns 1 - the decay rate of Adafactor's second moment, (step + 1)^-0.8, and its relative step size.

    The relative step size is min(learning_rate, 1 / sqrt(step + 1)) (Shazeer and Stern, 2018, sections 7 and 8, where
    the learning rate is 0.01).
    """
    return (step + 1) ** -0.8, min(learning_rate, (step + 1) ** -0.5)


def ema_weight(step: int, decay: float) -> float:
    """Returns the weight of the new parameters in their exponential moving average, after step 0, 1, ...

    It is 1 - decay, and larger at the beginning, so that the average forgets the initial parameters soon: the decay
    of step t is at most (1 + t) / (10 + t), as in TensorFlow's ExponentialMovingAverage.
    """
    return 1 - min(decay, (1 + step) / (10 + step))
