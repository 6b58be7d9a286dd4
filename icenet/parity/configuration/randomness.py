"""Checks that rounding is the only difference between two equal runs: the noise must not contain random numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from icenet.core.engine import Batch, Engine
from icenet.core.errors import UsageError
from icenet.parity.configuration.engines import Engines, record
from icenet.parity.measures import half_ulp, rms
from icenet.parity.trace import Trace
from icenet.parity.yardstick import FACTOR, ZERO


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

    mlx, torch, reference = (partial(recorded, engine) for engine in engines)
    check_equal_runs(mlx, torch, reference, engines.mlx.config.training.mixed_precision)


def check_equal_runs(
    mlx: Callable[[], Trace], torch: Callable[[], Trace], reference: Callable[[], Trace], dtype: str
) -> None:
    """Checks that two runs of MLX, and two of the reference, differ by rounding only.

    Args:
        mlx, torch, reference: Record a run in the dtype under test, by PyTorch, and by the reference.
        dtype: Compute dtype under test.

    Raises:
        UsageError: The outputs of a module differ between the two runs.
    """
    exact, noisy = reference(), lru_cache(maxsize=None)(torch)
    _require_equal("PyTorch", exact, reference(), lambda name, a, b: rms(a - b) <= ZERO * rms(a))

    def is_rounding(name: str, a: Any, b: Any) -> bool:
        r, n = exact.values.get(name), noisy().values.get(name)
        if r is None or n is None:
            return False
        # MLX may have other axes, which the RMS does not depend on
        return rms(a - b) <= FACTOR * max(rms(n.array - r.array), rms(half_ulp(r.array, dtype)))

    _require_equal("MLX", mlx(), mlx(), is_rounding)


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
