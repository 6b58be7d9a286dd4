"""Numbers of a step that are pure functions of it, computed on the host in float64.

Computed inside MLX's graph a schedule is off by 1e-6 to 1e-5, and a bias correction by more.
"""

from __future__ import annotations

import math

from icenet.core.config import TrainingConfig


def learning_rate(step: int, training: TrainingConfig) -> float:
    """The learning rate of step 0, 1, ... max_steps - 1.

    Rises linearly over `warmup_steps` to `learning_rate`, then stays (constant) or falls along a half cosine
    to `min_learning_rate` at the last step (Loshchilov and Hutter, 2017, without restarts).
    """
    peak, least = training.learning_rate, training.min_learning_rate
    if step < training.warmup_steps:
        return peak * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return peak
    span = max(training.max_steps - 1 - training.warmup_steps, 1)
    progress = min((step - training.warmup_steps) / span, 1.0)
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * progress))


def adam_corrections(step: int, beta1: float, beta2: float) -> tuple[float, float]:
    """1 - beta^(step + 1) of both moments: what a running mean that began at zero is divided by."""
    return 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
