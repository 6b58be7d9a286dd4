"""The parity criterion: the error of MLX, measured in units of PyTorch's rounding error.

A model runs three times on the same weights, inputs and dropout masks. Each tensor x then has three values:

    reference   r = x by PyTorch in float64 on the CPU, in place of exact arithmetic
    noise       n = x by PyTorch in the dtype under test, minus r
    error       e = x by MLX in the dtype under test, minus r

MLX passes if both ratios are at most FACTOR = 8:

    rms_ratio  = rms(e) / max(rms(n), floor)
    peak_ratio = max|e| / max(max|n|, floor)

The RMS is over all elements. The second ratio exists because one wrong element vanishes in the RMS of a million.

A fixed tolerance would be too wide for one tensor and too narrow for the next. The noise accounts for the magnitude
of a value, for its condition, and for its depth in the model. A ratio above 8 means "differs here". It does not say
which framework is wrong.

The noise of PyTorch can be zero by chance or by structure, so it has floors. Each floor is an error that a correct
implementation may have. Half an ulp of 1 is u = 2^-24 (fp32), 2^-8 (bf16) or 2^-11 (fp16).

1.  Rounding of the result: half an ulp of each element of r. PyTorch may be exact where MLX rounds correctly.
2.  Underflow: the smallest normal number of fp32 and bf16. Hardware may flush smaller numbers to zero. For a
    gradient also 2^-52 of the RMS of the cotangents: the derivative of tanh at 20 is 1.7e-17, and 0 in float64 too if
    it is computed as 1 - tanh^2. In fp16 the smallest normal number, 2^-14, of the RMS of the cotangents: MLX's
    sigmoid at -11.1 is 0, because its exponential overflows, and so is its derivative. For the same reason an output
    of a layer in fp16 may be 0 in place of up to 2^-16, the reciprocal of the largest number; its floor is 2^-18. In
    bf16 2^-16 of the RMS of the cotangents, the square of half an ulp of 1: the gradient by the scores of a softmax
    of nearly equal scores is a difference of rounded numbers.
3.  Cancellation: u * rms(all gradients of the layer), for a gradient that is zero in exact arithmetic because its
    terms cancel. Example: the bias of a key projection, because softmax is invariant to a shift of its inputs. The
    computed gradient is the rounding error of the terms. The terms cannot be seen in their sum, but the other
    gradients of the layer sum terms of the same size. A gradient counts as zero if rms(r) is at most 2^-40 of that
    RMS: rounding errors of float64 are below this limit, gradients that affect training above it. If the terms are
    less exact than half an ulp, so is their sum: then the floor is the noise of all gradients of the layer.
    Example: the bias before a batch norm over two values, x1 and x2. Its result is nearly +1 and -1 for any x1 and
    x2, so the terms are small differences of large numbers. PyTorch's two are exactly opposite, so its sum is 0.
4.  Mean over m values (the loss): rms(noise of the values) / sqrt(m). The noise of a single number is sometimes
    close to zero by chance.

One run is one draw of the noise. If a ratio exceeds FACTOR, more are taken, with the floors 5 to 8 of
`icenet.parity.resampling`. Its `judge_values` applies the criterion to all values of a run. Training curves have the
floors 1 and 5 and the running maximum of the noise (see `icenet.parity.curves`).

One value cannot be compared this way: Adam divides a gradient by its own size, so that where a gradient is zero but
for rounding its update has a random sign and the size of the learning rate. Therefore the update of a training step
is compared with the update by PyTorch on the gradients of MLX, and the gradients are compared separately.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from icenet.parity.measures import blocks, half_ulp, peak, sum_of_products

FACTOR = 8.0
"""The largest ratio of MLX's error to PyTorch's noise that passes."""

ZERO = 2.0**-40
"""A gradient whose RMS is below this share of the layer's counts as zero in exact arithmetic (floor 3)."""

_SMALLEST_NORMAL = {"fp32": 2.0**-126, "bf16": 2.0**-126}


@dataclass(frozen=True)
class Judgement:
    """The result for one tensor.

    Attributes:
        error: rms(e): MLX minus the reference.
        noise: rms(n): PyTorch minus the reference, or the floor if that is larger.
        rms_ratio, peak_ratio: See the module's docstring.
        floored: Whether the larger ratio has the floor as its denominator.
        note: The reason if the tensors cannot be compared (shape, not finite), else empty.
        plain_ratio: The larger ratio without floor 6; 0 if that floor was not needed.
        scale: rms(r) of the reference r.
    """

    error: float
    noise: float
    rms_ratio: float
    peak_ratio: float
    floored: bool = False
    note: str = ""
    plain_ratio: float = 0.0
    scale: float = 0.0

    @classmethod
    def incomparable(cls, note: str) -> Judgement:
        """Returns the failed result of tensors that cannot be compared."""
        return cls(math.inf, 0.0, math.inf, math.inf, note=note)

    @property
    def ratio(self) -> float:
        """The larger of the two ratios."""
        return max(self.rms_ratio, self.peak_ratio)

    @property
    def passed(self) -> bool:
        return self.ratio <= FACTOR

    @property
    def is_over(self) -> bool:
        """Whether the ratio is over the tolerance, and not because the values cannot be compared."""
        return not self.passed and math.isfinite(self.ratio)


def judge(
    mlx: npt.ArrayLike,
    torch: npt.ArrayLike,
    reference: npt.ArrayLike,
    dtype: str = "fp32",
    *,
    stored: str | None = None,
    layer_rms: float = 0.0,
    layer_noise: tuple[float, float] = (0.0, 0.0),
    min_noise: float = 0.0,
    sampled_noise: npt.ArrayLike | None = None,
) -> Judgement:
    """Compares a tensor (or number) of MLX with PyTorch by the criterion of this module.

    Args:
        mlx, torch: Results in the dtype under test.
        reference: Result of PyTorch in float64.
        dtype: Compute dtype under test: fp32, bf16 or fp16.
        stored: Dtype of the result; default: `dtype`. The gradients of a bf16 run are fp32.
        layer_rms: For a gradient, the RMS of all gradients of its layer (floor 3).
        layer_noise: The RMS and the largest value of the noise of these gradients (floor 3).
        min_noise: A known lower bound of the noise (floor 4).
        sampled_noise: Noise of each element, in the shape of the reference (floor 5).

    Returns:
        A judgement that also fails if the shapes are unequal, or if a value is not finite on one side only.
    """
    a, b, r = (np.asarray(values) for values in (mlx, torch, reference))
    if a.shape != r.shape or b.shape != r.shape:
        return Judgement.incomparable(
            f"shape {list(a.shape)} in MLX, {list(b.shape)} in PyTorch, {list(r.shape)} in the reference"
        )
    stored, note = stored or dtype, ""
    a, b, r = a.reshape(-1), b.reshape(-1), r.reshape(-1)
    sampled = None if sampled_noise is None else np.asarray(sampled_noise).reshape(-1)
    sizes = _measure(a, b, r, sampled)
    if not sizes.is_finite:
        finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(r)
        # fp16 may overflow on both sides, and masks hold -inf on both; anything else is a difference
        if not np.array_equal(np.where(np.isfinite(a), 0, a), np.where(np.isfinite(b), 0, b), equal_nan=True):
            mlx_only = int((~np.isfinite(a) & np.isfinite(b)).sum())
            side = f"{mlx_only} values not finite in MLX only" if mlx_only else "not finite in PyTorch only"
            return Judgement.incomparable(side)
        if not finite.any() and dtype == "fp32":
            return Judgement.incomparable("no value is finite on either side, so nothing is compared")
        if not finite.any():
            return Judgement(0.0, 0.0, 0.0, 0.0, note=f"{r.size} values not finite on both")
        note = "" if finite.all() else f"{int((~finite).sum())} values not finite on both"
        a, b, r = a[finite], b[finite], r[finite]
        sizes = _measure(a, b, r, None if sampled is None else sampled[finite])
    least = [max(min_noise, _SMALLEST_NORMAL.get(stored, 0.0))] * 2
    if layer_rms and sizes.scale <= ZERO * layer_rms:
        least = [max(least[0], layer_rms * float(half_ulp(1.0, dtype)), noise) for noise in layer_noise]
    rounding = float(half_ulp(sizes.largest, stored))  # of the largest value; of the others it is smaller
    floors = [max(rounding, size, floor) for size, floor in zip(sizes.sampled, least, strict=True)]
    if sizes.noise[0] < floors[0]:
        is_larger = sizes.noise[0] >= _largest_rounding(sizes.scale, stored)
        floors[0] = max(0.0 if is_larger else _rounding_rms(r, stored), sizes.sampled[0], least[0])
    ratios = [e / max(n, floor) for e, n, floor in zip(sizes.error, sizes.noise, floors, strict=True)]
    decisive = 0 if ratios[0] >= ratios[1] else 1
    return Judgement(
        error=sizes.error[0],
        noise=max(sizes.noise[0], floors[0]),
        rms_ratio=ratios[0],
        peak_ratio=ratios[1],
        floored=floors[decisive] > sizes.noise[decisive],
        note=note,
        scale=sizes.scale,
    )


class _Sizes(NamedTuple):
    """The root mean square and the largest absolute value of the errors, of the noise and of the sampled noise.

    Attributes:
        error, noise, sampled: These two numbers of each.
        scale, largest: The same two numbers of the reference.
    """

    error: tuple[float, float]
    noise: tuple[float, float]
    sampled: tuple[float, float]
    scale: float
    largest: float

    @property
    def is_finite(self) -> bool:
        """Whether all values are finite."""
        return all(map(math.isfinite, (self.error[0], self.noise[0], self.largest)))


def _measure(
    a: npt.NDArray[Any], b: npt.NDArray[Any], r: npt.NDArray[Any], sampled: npt.NDArray[Any] | None
) -> _Sizes:
    squares, peaks, scale, largest = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 0.0, 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for x, y, exact in blocks(a, b, r):
            for index, difference in enumerate((x - exact, y - exact)):
                squares[index] += sum_of_products(difference, difference)
                peaks[index] = max(peaks[index], peak(difference))
            scale += sum_of_products(exact, exact)
            largest = max(largest, peak(exact))
        for (x,) in blocks(sampled) if sampled is not None else ():
            squares[2] += sum_of_products(x, x)
            peaks[2] = max(peaks[2], peak(x))
    pairs = [(math.sqrt(total / max(r.size, 1)), peak) for total, peak in zip(squares, peaks, strict=True)]
    return _Sizes(pairs[0], pairs[1], pairs[2], math.sqrt(scale / max(r.size, 1)), largest)


def _largest_rounding(scale: float, stored: str) -> float:
    """Returns an upper bound of `_rounding_rms`, given the root mean square of the values."""
    return float(half_ulp(1.0, stored) * scale + half_ulp(0.0, stored))


def _rounding_rms(r: npt.NDArray[Any], stored: str) -> float:
    """Returns the root mean square of half an ulp of each value."""
    total = 0.0
    for (exact,) in blocks(r):
        rounding = half_ulp(exact, stored)
        total += sum_of_products(rounding, rounding)
    return math.sqrt(total / r.size) if r.size else 0.0
