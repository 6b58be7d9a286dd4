"""Checks that rounding is the only difference between two equal runs: the noise must not contain random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from icenet.core.engine import Batch, Engine
from icenet.core.errors import UsageError
from icenet.parity.engines import Engines, record
from icenet.parity.trace import Trace
from icenet.parity.yardstick import ZERO, judge, rms


def check_randomness(engines: Engines, batch: Batch, step: int = 0) -> None:
    """Checks that a model computes the same twice in training mode, with the same dropout keys.

    All generators of the framework, Python and numpy must keep their states. That does not see a generator of the
    user. So MLX and the reference also run twice, and no value may differ by more than rounding: in the reference by
    2^-40 of its size, in MLX by the yardstick.

    Raises:
        UsageError: A module draws random numbers without a key, or its outputs differ between the two runs.
    """
    for engine in engines:
        engine.check_draws(batch, step)

    def recorded(engine: Engine) -> Trace:
        return record(engine, batch, step, train=True)

    reference = recorded(engines.reference)
    _require_equal("PyTorch", reference, recorded(engines.reference), lambda name, a, b: rms(a - b) <= ZERO * rms(a))
    mlx = recorded(engines.mlx)
    noisy: list[Trace] = []

    def is_rounding(name: str, a: Any, b: Any) -> bool:
        if not noisy:
            noisy.append(recorded(engines.torch))
        exact, torch = reference.values.get(name), noisy[0].values.get(name)
        if exact is None or torch is None or exact.array.shape != a.shape:
            return False
        dtype = engines.mlx.config.training.mixed_precision
        return judge(exact.array + (b - a), torch.array, exact.array, dtype, stored=torch.dtype).passed

    _require_equal("MLX", mlx, recorded(engines.mlx), is_rounding)


def _require_equal(framework: str, first: Trace, second: Trace, is_rounding: Any) -> None:
    """Raises UsageError for the first module whose outputs differ between two runs by more than rounding."""
    for name, value in first.values.items():
        other = second.values.get(name)
        if other is not None and other.array.shape == value.array.shape:
            a, b = value.array, other.array
            if np.array_equal(a, b, equal_nan=value.is_float) or (
                value.is_float and is_rounding(name, a.astype(np.float64), b.astype(np.float64))
            ):
                continue
        path = name.partition(":")[2] or "the model"
        raise UsageError(
            f"{path}: two runs of {framework} with the same weights, inputs and dropout masks differ by more than "
            "rounding, so the backends cannot be compared: take out its random numbers, or draw them by nn.Dropout"
        )
