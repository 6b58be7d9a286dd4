"""The criterion for training curves: the distance of MLX from PyTorch at each step, over the noise until then."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from icenet.parity import resampling
from icenet.parity.measures import Floats, half_ulp, squared_distance
from icenet.parity.resampling import Samples
from icenet.parity.yardstick import FACTOR


@dataclass(frozen=True)
class CurveJudgement:
    """The result for one training curve. Arrays are float64 `[steps]`.

    Attributes:
        gap: |MLX - PyTorch| at each step.
        noise: Running maximum of |PyTorch - reference|, at least half an ulp.
        ratios: `gap / noise`.
        worst, worst_step: The largest of `ratios`, and its index (0 is the first step).
        strict, strict_step: The same without the running maximum; for information only.
        plain_worst: The largest ratio without floor 6; 0 if that floor was not needed.
        passed: Whether `worst` is at most FACTOR.
    """

    gap: Floats
    noise: Floats
    ratios: Floats
    worst: float
    worst_step: int
    strict: float
    strict_step: int
    plain_worst: float = 0.0

    @property
    def passed(self) -> bool:
        return self.worst <= FACTOR


def judge_curve(
    mlx: npt.ArrayLike,
    torch32: npt.ArrayLike,
    torch64: npt.ArrayLike,
    samples: Samples[Callable[[int], npt.ArrayLike]] | None = None,
) -> CurveJudgement:
    """Compares training curves: the loss at each step by MLX, by PyTorch, and by PyTorch in float64.

    Passes if at every step |MLX - PyTorch| <= FACTOR * noise, where

        noise[t] = max(max over s <= t of |PyTorch[s] - float64[s]|, half an ulp of fp32 at float64[t])

    The running maximum is needed because curves cross: where they do, the distance is zero by chance. It does not
    help at the first steps, where a loss is a single number. So if a ratio exceeds FACTOR, the RMS noise of SAMPLES
    nearby runs is used as well (floor 5).

    Args:
        mlx, torch32: Losses `[steps]` in the dtype under test.
        torch64: Losses `[steps]` of the reference.
        samples: Return the losses `[steps]` of sample 0 to SAMPLES - 1.

    Raises:
        ValueError: The curves are empty or of unequal length.
    """
    a, b, r = (np.atleast_1d(np.asarray(values, np.float64)) for values in (mlx, torch32, torch64))
    if a.size == 0 or not a.shape == b.shape == r.shape or a.ndim != 1:
        raise ValueError(f"curves of {a.shape}, {b.shape} and {r.shape} steps cannot be compared")
    judgement = _judge_curve(a, b, r, np.zeros(r.shape))
    if samples is None or judgement.passed or not math.isfinite(judgement.worst):
        return judgement
    judgement = _judge_curve(a, b, r, _curve_noise(samples.torch, samples.reference))
    if samples.in_order is None or judgement.passed:
        return judgement
    again = _judge_curve(a, b, r, _curve_noise(samples.in_order, samples.reference))
    return replace(again, plain_worst=judgement.worst)


def _curve_noise(run: Callable[[int], npt.ArrayLike], reference: Callable[[int], npt.ArrayLike]) -> Floats:
    """Returns the RMS noise of SAMPLES runs at each step."""
    squares = [squared_distance(run(index), reference(index)) for index in range(resampling.SAMPLES)]
    noise: Floats = np.sqrt(np.mean(squares, axis=0))
    return noise


def _judge_curve(a: Floats, b: Floats, r: Floats, sampled: Floats) -> CurveJudgement:
    with np.errstate(invalid="ignore"):
        gap, distance = np.abs(a - b), np.abs(b - r)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(r)
    distance = np.maximum(distance, sampled)
    rounding = half_ulp(np.where(np.isfinite(r), r, 0.0), "fp32")
    noise = np.maximum(np.maximum.accumulate(np.where(finite, distance, 0.0)), rounding)
    ratios = np.where(finite, gap / noise, np.inf)  # a loss that is not finite never passes
    strict = np.where(finite, gap / np.maximum(distance, rounding), np.inf)
    worst, strict_step = int(np.argmax(ratios)), int(np.argmax(strict))
    return CurveJudgement(gap, noise, ratios, float(ratios[worst]), worst, float(strict[strict_step]), strict_step)
