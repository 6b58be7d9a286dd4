"""The one judge of parity: how far MLX may be from the truth, measured by how far PyTorch is.

    reference   PyTorch in float64 on the CPU, which stands for exact arithmetic
    noise       PyTorch in the dtype under test, minus the reference: what rounding does to this value here
    error       MLX in the same dtype, minus the reference
    ratio       error / noise; MLX passes up to FACTOR

A fixed tolerance would be too wide for one tensor and too narrow for the next; the noise of a value knows its
magnitude, its condition and its depth in the model. A ratio above FACTOR says "differs here". It does not say
which of the two is wrong.

A tensor is compared twice: by the RMS over its elements, and by its largest element, so that one wrong row
does not vanish in the mean of a million right ones. The ratio is the larger of the two.

Noise can be zero by luck or by structure, so it has a floor. Each floor is the error of a result that nobody
could call wrong:

1.  Half an ulp of the value: the rounding of an exact result to the dtype it is stored in. Where PyTorch is
    exact (a copy, a sum of small integers), MLX may still round correctly.
2.  The least normal number, for fp32 and bf16: hardware may flush what is smaller to zero.
3.  Where a tensor is zero in exact arithmetic because its terms cancel (the gradient of a key projection's
    bias, since softmax does not change when all its inputs shift alike), what is left is the rounding of the
    terms: u times their size, u = half an ulp of 1. How large they were is not to be seen in the result, but
    it is in the other gradients of the same layer, which sum the same terms weighted by inputs of order 1. So
    there the noise is at least u * RMS(gradients of the layer). It applies only where the reference is below
    2^-40 of that RMS, which rounding of float64 reaches and no gradient of consequence does.
4.  A mean over n values (the loss) of noise d each has noise of at least d / sqrt(n). It matters because a
    single number has no RMS: PyTorch's error in it is near zero once in a while, by chance.
5.  So it is with a tensor of few values, such as the bias of a layer two wide: the RMS of two errors is an eighth
    of what is usual once in 65 times. And PyTorch may add up in float64 inside, to exact sums of terms that were
    rounded before. So where a ratio is over FACTOR, PyTorch is run SAMPLES times more in the dtype under test, its
    weights, inputs and cotangents rounded anew (`perturb_by_ulp`), which draws every rounding inside anew too. The
    noise of each value is at least the RMS of its distances from the reference: `spread`. What MLX computed does
    not change, nor does FACTOR; it is the noise that is measured better.

Curves have floor 1 and, against the same chance, the running maximum: see `judge_curve`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import rng

FACTOR = 8.0
"""How many times PyTorch's own noise MLX's error may be."""

SAMPLES = 8
"""How many times PyTorch is run again on inputs rounded anew, where a ratio is over FACTOR (see floor 5)."""

ZERO = 2.0**-40
"""A tensor below this share of the gradients beside it is zero in exact arithmetic (see floor 3)."""

# dtype: (bits of mantissa without the leading one, exponent of the least normal number)
_FORMATS = {"fp64": (52, -1022), "fp32": (23, -126), "bf16": (7, -126), "fp16": (10, -14)}
_FLUSHED = {"fp32": 2.0**-126, "bf16": 2.0**-126}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Judgement:
    """The verdict on one tensor.

    Attributes:
        error: RMS of MLX minus the reference.
        noise: RMS of PyTorch minus the reference, or its floor where that is larger.
        rms_ratio, peak_ratio: MLX over PyTorch by RMS, and by the largest element.
        floored: the floor, not PyTorch's error, decided the ratio.
        note: what hinders a comparison (another shape, not finite), else empty.
    """

    error: float
    noise: float
    rms_ratio: float
    peak_ratio: float
    floored: bool = False
    note: str = ""

    @property
    def ratio(self) -> float:
        """The larger of the two ratios."""
        return max(self.rms_ratio, self.peak_ratio)

    @property
    def passed(self) -> bool:
        return self.ratio <= FACTOR


@dataclass(frozen=True)
class CurveJudgement:
    """The verdict on one training curve.

    Attributes:
        gap: |MLX - PyTorch| at each step.
        noise: the yardstick at each step: the running maximum, floored.
        ratios: gap / noise.
        worst, worst_step: the largest of `ratios` and where it is.
        strict, strict_step: the same with each step's own distance in place of the running maximum (still at
            least half an ulp); told for information.
        passed: `worst` is at most FACTOR.
    """

    gap: Floats
    noise: Floats
    ratios: Floats
    worst: float
    worst_step: int
    strict: float
    strict_step: int

    @property
    def passed(self) -> bool:
        return self.worst <= FACTOR


def rms(values: npt.ArrayLike) -> float:
    """The root of the mean square; 0 of nothing."""
    array = np.asarray(values, np.float64)
    return float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0


def half_ulp(values: npt.ArrayLike, dtype: str = "fp32") -> Floats:
    """Half the distance between neighbours of `dtype` (fp64, fp32, bf16, fp16) at each value."""
    mantissa, least = _FORMATS[dtype]
    array = np.abs(np.asarray(values, np.float64))
    exponent = np.where(array == 0, least, np.maximum(np.frexp(array)[1] - 1, least))
    halves: Floats = np.ldexp(1.0, exponent - mantissa - 1)
    return halves


def judge(
    mlx: npt.ArrayLike,
    torch: npt.ArrayLike,
    reference: npt.ArrayLike,
    dtype: str = "fp32",
    *,
    stored: str | None = None,
    beside: float = 0.0,
    floor: float = 0.0,
    spread: npt.ArrayLike | None = None,
) -> Judgement:
    """Judges one tensor (or number) of MLX.

    Args:
        mlx, torch: what the two computed in `dtype`.
        reference: what PyTorch computed in float64.
        dtype: of the arithmetic: fp32, bf16 or fp16.
        stored: dtype of the result where it is another (the fp32 gradients of a bf16 run).
        beside: for a gradient, the RMS of all gradients of its layer (floor 3).
        floor: noise that is known from elsewhere (floor 4).
        spread: noise of each value, in the shape of the reference (floor 5).
    """
    a, b, r = (np.asarray(values, np.float64) for values in (mlx, torch, reference))
    if a.shape != r.shape or b.shape != r.shape:
        shapes = f"shape {list(a.shape)} in MLX, {list(b.shape)} in PyTorch, {list(r.shape)} in the reference"
        return Judgement(math.inf, 0.0, math.inf, math.inf, note=shapes)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(r)
    if not finite.all():
        # Both may overflow alike (fp16), or hold the -inf of a mask; anywhere else it is a difference.
        if not np.array_equal(np.where(np.isfinite(a), 0, a), np.where(np.isfinite(b), 0, b), equal_nan=True):
            alone = int((~np.isfinite(a) & np.isfinite(b)).sum())
            what = f"{alone} values not finite in MLX alone" if alone else "not finite in PyTorch alone"
            return Judgement(math.inf, 0.0, math.inf, math.inf, note=what)
        a, b, r = a[finite], b[finite], r[finite]
    error, noise = np.abs(a - r), np.abs(b - r)
    stored = stored or dtype
    rounding = half_ulp(r, stored)
    least = max(floor, _FLUSHED.get(stored, 0.0))
    moved = np.zeros(1) if spread is None else np.asarray(spread, np.float64)
    moved = moved if moved.shape != finite.shape or finite.all() else moved[finite]
    if beside and rms(r) <= ZERO * beside:
        least = max(least, beside * float(half_ulp(1.0, dtype)))
    measured = rms(noise), _peak(noise)
    floored = max(rms(rounding), rms(moved), least), max(_peak(rounding), _peak(moved), least)
    rms_ratio, peak_ratio = (
        found / max(own, lowest)
        for found, own, lowest in zip((rms(error), _peak(error)), measured, floored, strict=True)
    )
    decisive = 0 if rms_ratio >= peak_ratio else 1
    return Judgement(
        error=rms(error),
        noise=max(measured[0], floored[0]),
        rms_ratio=rms_ratio,
        peak_ratio=peak_ratio,
        floored=floored[decisive] > measured[decisive],
        note="" if finite.all() else f"{int((~finite).sum())} values not finite on both",
    )


def _peak(values: Floats) -> float:
    return float(values.max()) if values.size else 0.0


def judge_curve(mlx: npt.ArrayLike, torch32: npt.ArrayLike, torch64: npt.ArrayLike) -> CurveJudgement:
    """Judges a training curve: the loss at each step on MLX, on PyTorch, and on PyTorch in float64.

    At each step |MLX - PyTorch| is at most FACTOR times the noise. A curve crosses its reference now and then,
    and at that step |PyTorch - float64| is zero though nothing became exact: the noise of a step is the
    largest distance up to it, and at least half an ulp of fp32 at its loss.

    Args:
        mlx, torch32: losses `[steps]` in the dtype under test.
        torch64: losses `[steps]` of the reference.

    Raises:
        ValueError: the curves are empty or of unequal length.
    """
    a, b, r = (np.atleast_1d(np.asarray(values, np.float64)) for values in (mlx, torch32, torch64))
    if a.size == 0 or not a.shape == b.shape == r.shape or a.ndim != 1:
        raise ValueError(f"curves of {a.shape}, {b.shape} and {r.shape} steps cannot be compared")
    with np.errstate(invalid="ignore"):
        gap, distance = np.abs(a - b), np.abs(b - r)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(r)
    rounding = half_ulp(np.where(np.isfinite(r), r, 0.0), "fp32")
    noise = np.maximum(np.maximum.accumulate(np.where(finite, distance, 0.0)), rounding)
    ratios = np.where(finite, gap / noise, np.inf)  # a loss that is no number is parity nowhere
    strict = np.where(finite, gap / np.maximum(distance, rounding), np.inf)
    worst, strict_step = int(np.argmax(ratios)), int(np.argmax(strict))
    return CurveJudgement(gap, noise, ratios, float(ratios[worst]), worst, float(strict[strict_step]), strict_step)


def perturb_by_ulp(values: npt.ArrayLike, dtype: str, key: npt.NDArray[np.uint32]) -> Floats:
    """Values of which one in twelve, drawn under `key`, is moved by an ulp of `dtype` up or down.

    The mean square of that is the one of a rounding, ulp^2 / 12, and each value stays one of the dtype's. Zeros and
    what is not finite (masks) stay.
    """
    array = np.asarray(values, np.float64)
    chance = rng.uniform(key, array.shape)
    step = (chance >= 23 / 24).astype(np.float64) - (chance < 1 / 24)
    movable = np.isfinite(array) & (array != 0)
    moved: Floats = array + np.where(movable, 2 * step * half_ulp(np.where(movable, array, 1.0), dtype), 0.0)
    return moved


def noise_rms(exact: npt.ArrayLike, samples: Sequence[npt.ArrayLike]) -> Floats:
    """The RMS distance of samples from a value, element by element (floor 5)."""
    r = np.asarray(exact, np.float64)
    with np.errstate(invalid="ignore"):
        squares = [np.nan_to_num(np.square(np.asarray(s, np.float64) - r), nan=0.0, posinf=0.0) for s in samples]
    found: Floats = np.sqrt(np.mean(squares, axis=0))
    return found


def round_to(values: npt.ArrayLike, dtype: str) -> npt.NDArray[Any]:
    """Values rounded to the nearest of a dtype: float64, float32 or float16 arrays; bf16's as float32."""
    array = np.asarray(values)
    if dtype == "bf16":
        bits = array.astype(np.float32).view(np.uint32)
        even = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # ties go to even
        return np.where(np.isfinite(array), even & np.uint32(0xFFFF0000), bits).astype(np.uint32).view(np.float32)
    return array.astype({"fp64": np.float64, "fp32": np.float32, "fp16": np.float16}[dtype])
