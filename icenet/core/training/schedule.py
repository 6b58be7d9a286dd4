"""Numbers of a step that are pure functions of it, computed on the host in float64.

Computed inside MLX's graph a schedule is off by 1e-6 to 1e-5, and a bias correction by more.
"""

from __future__ import annotations

import math

from icenet.core.config import TrainingConfig


def learning_rate(step: int, training: TrainingConfig) -> float:
    """The learning rate of step 0, 1, ... max_steps - 1, before a parameter group changes it.

    Rises linearly over `warmup_steps` to `learning_rate`. What follows never falls below `min_learning_rate`:

        constant       stays
        linear         falls along a line that ends at `min_learning_rate` in the last step
        cosine         falls along half a cosine that ends there (Loshchilov and Hutter, 2017, without restarts)
        step           is multiplied by `decay_factor` every `decay_every` steps after the warm-up
        exponential    is multiplied by as much, a little in every step
        inverse_sqrt   falls as 1 / sqrt(step + 1) from what it is at the end of the warm-up (Vaswani et al., 2017)
        wsd            stays, and in the last `decay_steps` steps falls along a line that ends at `min_learning_rate`
                       (warm-up, stable, decay; Hu et al., 2024, with a line for their exponential)

    A warm-up longer than the run is cut off by its end. A decay longer than what the warm-up leaves is shortened.
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
    """How many steps schedule wsd has done when its decay begins; None: it has none, or the schedule is another."""
    if training.schedule != "wsd":
        return None
    length = training.max_steps // 5 if training.decay_steps is None else training.decay_steps
    start = max(training.max_steps - length, training.warmup_steps)
    return start if start < training.max_steps else None


def adam_corrections(step: int, beta1: float, beta2: float) -> tuple[float, float]:
    """1 - beta^(step + 1) of both moments: what a running mean that began at zero is divided by."""
    return 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)


def adafactor_scalars(step: int, learning_rate: float) -> tuple[float, float]:
    """How far Adafactor's running means move in a step, (step + 1)^-0.8, and its relative step size.

    The latter is 1 / sqrt(step + 1), and at most the learning rate (Shazeer and Stern, 2018, sections 7 and 8, with
    the schedule's rate for their 0.01).
    """
    return (step + 1) ** -0.8, min(learning_rate, (step + 1) ** -0.5)


def ema_weight(step: int, decay: float) -> float:
    """How far a running mean of the weights moves towards those of step 0, 1, ...

    1 - decay, and more at the beginning, so that the mean soon forgets the initial weights: the decay of step t is
    at most (1 + t) / (10 + t), as in TensorFlow's ExponentialMovingAverage.
    """
    return 1 - min(decay, (1 + step) / (10 + step))
