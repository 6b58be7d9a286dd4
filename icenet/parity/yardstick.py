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
    RMS: rounding errors of float64 are below this limit, gradients that affect training above it.
4.  Mean over m values (the loss): rms(noise of the values) / sqrt(m). The noise of a single number is sometimes
    close to zero by chance.
5.  Samples: one run of PyTorch is one draw of the noise. For few elements it is sometimes small by chance: the RMS of
    two noise values is below 1/8 of its expectation once in 65 times, one noise value once in 10 times. Which values
    are unlucky depends on the processor, because it decides the order of sums. PyTorch may also sum in float64
    internally, which makes the noise of a sum zero. So if a ratio exceeds FACTOR, PyTorch runs SAMPLES = 12 more
    times with perturbed values, and the floor of each element is the RMS of its 12 distances from r.

    Each sample solves a nearby problem: the weights, the inputs, the optimizer state and the cotangents are moved by
    up to 4 ulps (`nearby`), PyTorch runs on them in the dtype under test and in float64, and the noise is the
    distance between the two. So all roundings differ from sample to sample, and the condition stays the same. In the
    run in the dtype under test, these values and the outputs of all modules and their gradients are also moved by one
    ulp, up or down, each in exactly one of the 12 samples (`perturb_by_ulp`), as if each had been rounded once more:
    the mean square of that change is ulp^2 / 12, the variance of a rounding. Sums that PyTorch takes in float64
    therefore have the noise of their terms.

    The RMS of 12 independent normal draws is below a third of its expectation once in 14,000 times, for a single
    number too. If the errors of MLX and PyTorch are equally large, a single number exceeds FACTOR by chance once in
    13 times with one draw, and once in 270,000 times with 12. Neither number depends on the processor.

6.  Sums of n terms in fp32. PyTorch takes them in many partial sums or in float64, MLX mostly term by term. Then the
    rounding error grows with sqrt(n): 20 times PyTorch's for the statistics of a plain `mlx.nn.BatchNorm` over 16
    images of 32x32, 24 times for the bias gradient of a plain `mlx.nn.Linear` over 8192 tokens. IceNet's own layers
    avoid this and are not granted this floor where IceNet's models are compared. For MLX's own layers, for a user's
    code and in `compare`, if a ratio exceeds FACTOR with floor 5, the samples are taken again with all sums of
    PyTorch term by term, also those within its norms, softmax and bias gradients, and the products that have few
    results of many terms (`icenet_torch.tools.sums`): the order there is that of the BLAS, which depends on the
    processor. The roundings of a long sum hardly depend on the last bits of its terms, so the sums of each sample
    begin at another term. A value that then passes is reported as less exact, with the ratio without this floor
    (`plain_ratio`). A wrong eps, momentum or variance is much larger. The error function in fp32 is moved by up to an
    ulp of 1 in these samples, as MLX's is. Its errors, and those of GELU, are up to 4e-7 on a CPU, PyTorch's 3e-8.
    `exp` has the errors of MLX's as well.

7.  Jumps. A large model has values that are within rounding of the edge of a ReLU, and a gradient jumps if a rounding
    moves one across: in ResNeXt-101 with random weights by 1e-2 of its size, in every second run of either framework.
    The few samples of a port may all miss it. So if a gradient of a port exceeds FACTOR with the floors above, its
    floor is the RMS distance between the references of FEW nearby problems and r, if that is a jump: over FACTOR
    times the noise, and over JUMP of the gradient, 500 times what a change of 4 ulps is of a value.

8.  Maxima that a softmax subtracts. They do not change its result, but the gradient of a maximum takes the rounding
    errors of the terms back: in an attention over the edges of a graph the gradient of what all edges of a node share
    is 20 times more exact with the maximum of each node than with that of all scores. So if only gradients of a
    replay in fp32 are over the tolerance, and the reference computes the same gradients, to 2^-40, with maxima that
    are constants, the noise is sampled with such maxima.

Early end: sampling ends for a value with a large ratio, above 400 after 3 samples, 100 after 4, 52 after 6, 32 after
8 (LIMITS). With k samples the ratio of two equal normal errors has Student's t distribution with k degrees of
freedom. Even if the error of MLX is twice that of PyTorch, it exceeds these limits by chance less often than equal
errors exceed FACTOR after 12 samples. Of the results of a replay only the worst is reported, so sampling ends there
once an output is over the tolerance, or a gradient if no output is undecided. Once a value of a run is over the
tolerance, the report has failed, and FEW = 4 samples decide which of the other values are shown as over it; if a
layer differs in its replay, without repetitions. A correct value is shown so by chance once in 700 times, if it was
over the tolerance with one draw.

Repetition: the noise of an ill-conditioned value has outliers. Example: the gradient through a batch norm over two
values that are nearly equal, in half precision, is the reciprocal of a difference of rounding errors. No number of
samples bounds the next outlier. A wrong computation is wrong in each run, an outlier is not. So if a ratio exceeds
FACTOR with these floors as well, MLX also solves REPEATS = 8 of the nearby problems, and the median of the 9 ratios
decides. (Not for the update of a training step.)

FACTOR stays the same; the noise and the error are only measured with more samples.

`judge_values` applies the criterion to all values of a run: outputs, losses, gradients, replays of single layers,
optimizer steps and whole training steps. Training curves have the floors 1 and 5 and the running maximum of the noise
(see `icenet.parity.curves`).

One value cannot be compared this way: Adam divides a gradient by its own size, so that where a gradient is zero but
for rounding its update has a random sign and the size of the learning rate. Therefore the update of a training step
is compared with the update by PyTorch on the gradients of MLX, and the gradients are compared separately.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from icenet.parity.measures import (
    Floats,
    blocks,
    half_ulp,
    peak,
    rms,
    squared_distance,
    sum_of_products,
)
from icenet.parity.trace import Value

FACTOR = 8.0
"""The largest ratio of MLX's error to PyTorch's noise that passes."""

SAMPLES = 12
"""The number of runs of PyTorch on perturbed values if a ratio exceeds FACTOR (floor 5)."""

REPEATS = 8
"""The number of runs of MLX on nearby values if a ratio still exceeds FACTOR; the median of REPEATS + 1 decides."""

FEW = 4
"""The number of samples if a difference is already known or one sum is sampled; that of references that are kept."""

LIMITS = {3: 50 * FACTOR, 4: 12.5 * FACTOR, 6: 6.5 * FACTOR, 8: 4 * FACTOR}
"""A value over this ratio after so many samples is over the tolerance: no more are taken for it."""

REPEAT_LIMIT = 4 * FACTOR
"""A value over this ratio in the run and in two repetitions is over the tolerance."""

JUMP = 2.0**-12
"""A gradient that changes by more than this share of its RMS between nearby problems has a jump (floor 7)."""

ZERO = 2.0**-40
"""A gradient whose RMS is below this share of the layer's counts as zero in exact arithmetic (floor 3)."""

_SMALLEST_NORMAL = {"fp32": 2.0**-126, "bf16": 2.0**-126}

Values = Mapping[str, Value]
"""Values by `KIND:PATH`, as in a trace."""

F = TypeVar("F", covariant=True)
G = TypeVar("G")


@dataclass(frozen=True)
class Samples(Generic[F]):
    """Functions that solve nearby problems. The first argument of each is the number of the sample.

    Attributes:
        reference: By PyTorch in float64.
        torch: By PyTorch in the dtype under test, perturbed (floor 5).
        mlx: By MLX; None if a value is judged by its only run.
        in_order: By PyTorch that sums term by term, perturbed (floor 6); None for IceNet's own layers.
        count: The largest number of samples; None for SAMPLES.
        may_jump: Whether the gradients are those of a whole model, which may jump (floor 7).
    """

    reference: F
    torch: F
    mlx: F | None = None
    in_order: F | None = None
    count: int | None = None
    may_jump: bool = False

    def few(self) -> Samples[F]:
        """Returns FEW samples without repetitions, for values whose judgement does not change the verdict."""
        return replace(self, mlx=None, count=min(FEW, SAMPLES))

    def map(self, function: Callable[[F], G]) -> Samples[G]:
        """Returns the results of a function for each field that is not None."""
        mlx, in_order = (None if item is None else function(item) for item in (self.mlx, self.in_order))
        return Samples(function(self.reference), function(self.torch), mlx, in_order, self.count, self.may_jump)


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
            return Judgement.incomparable("no value is finite")
        if not finite.any():
            return Judgement(0.0, 0.0, 0.0, 0.0, note=f"{r.size} values not finite on both")
        note = "" if finite.all() else f"{int((~finite).sum())} values not finite on both"
        a, b, r = a[finite], b[finite], r[finite]
        sizes = _measure(a, b, r, None if sampled is None else sampled[finite])
    least = max(min_noise, _SMALLEST_NORMAL.get(stored, 0.0))
    if layer_rms and sizes.scale <= ZERO * layer_rms:
        least = max(least, layer_rms * float(half_ulp(1.0, dtype)))
    rounding = float(half_ulp(sizes.largest, stored))  # of the largest value; of the others it is smaller
    floors = [max(rounding, size, least) for size in sizes.sampled]
    if sizes.noise[0] < floors[0]:
        floors[0] = max(_rounding_rms(r, stored), sizes.sampled[0], least)
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


def _rounding_rms(r: npt.NDArray[Any], stored: str) -> float:
    """Returns the root mean square of half an ulp of each value."""
    total = 0.0
    for (exact,) in blocks(r):
        rounding = half_ulp(exact, stored)
        total += sum_of_products(rounding, rounding)
    return math.sqrt(total / r.size) if r.size else 0.0


def judge_values(
    mlx: Values,
    torch: Values,
    reference: Values,
    dtype: str = "fp32",
    samples: Samples[Callable[[int], Values]] | None = None,
    only_worst: bool = False,
    gradient_floor: float = 0.0,
    output_floor: float = 0.0,
) -> dict[str, Judgement]:
    """Compares the float values that all three runs have, by the criterion of this module.

    Args:
        mlx, torch: Values in the dtype under test.
        reference: Values in float64.
        dtype: Compute dtype under test: fp32, bf16 or fp16.
        samples: Return the values of sample 0 to SAMPLES - 1. Each is called only if a value is still over the
            tolerance: `torch` for floor 5, `in_order` for floor 6, `mlx` for repetitions.
        only_worst: Whether only the worst output is needed, or without one over the tolerance the worst gradient.
            Then the other values may be judged with fewer samples.
        gradient_floor, output_floor: Known lower bounds of the noise of gradients and outputs (floor 2).
    """
    run = _Run(mlx, torch, reference, dtype, gradient_floor, output_floor)
    found = {
        name: run.judge(name) for name, exact in reference.items() if exact.is_float and name in mlx and name in torch
    }
    over = [name for name, judgement in found.items() if judgement.is_over]
    if samples is None or not over:
        return found
    needed = _needed_for_worst if only_worst else _needed_for_verdict
    return found | _Resampling(run, samples, over, needed).judge(over)


class _Run:
    """The values of a run by the three sides, and the noise that is known of them. The arguments: `judge_values`.

    Attributes:
        mlx, torch, reference: The values.
        noises: Noise of each element that samples have shown (floors 5 to 7), by name.
    """

    def __init__(
        self, mlx: Values, torch: Values, reference: Values, dtype: str, gradient_floor: float, output_floor: float
    ) -> None:
        self.mlx, self.torch, self.reference = mlx, torch, reference
        self.noises: dict[str, Floats] = {}
        self._dtype = dtype
        self._gradient_floor, self._output_floor = gradient_floor, output_floor
        gradients = {_path(name): value for name, value in reference.items() if _is_gradient(name)}
        self._layer_rms = gradient_rms(gradients)

    def judge(self, name: str, array: npt.ArrayLike | None = None) -> Judgement:
        """Judges a value with the noise that is known of it.

        Args:
            name: Its name.
            array: What to judge in place of the value of MLX.
        """
        return judge(
            self.mlx[name].array if array is None else array,
            self.torch[name].array,
            self.reference[name].array,
            self._dtype,
            stored=self.torch[name].dtype,
            layer_rms=self._layer_rms[_parent(name)] if _is_gradient(name) else 0.0,
            min_noise=self._min_noise(name),
            sampled_noise=self.noises.get(name),
        )

    def _min_noise(self, name: str) -> float:
        if name == "loss:":
            return _loss_noise(self.torch, self.reference)
        if name.startswith(("gradient:", "input ")):
            return self._gradient_floor
        return self._output_floor if name.startswith("output") else 0.0


class _Resampling:
    """Judges values over the tolerance again, with samples of their noise and repetitions of MLX.

    Args:
        run: The values. The noise of the samples is added to it.
        samples: See `judge_values`.
        names: The values over the tolerance.
        needed: Returns whether more runs are needed, given the values that are undecided, those that are over the
            tolerance, and the number of runs so far.
    """

    def __init__(
        self,
        run: _Run,
        samples: Samples[Callable[[int], Values]],
        names: list[str],
        needed: Callable[[list[str], list[str], int], bool],
    ) -> None:
        self._run, self._samples, self._needed = run, samples, needed
        self._reference = _kept(samples.reference, names)
        self._count = samples.count or SAMPLES

    def judge(self, names: list[str]) -> dict[str, Judgement]:
        judged, cut = self._judge_with_samples(names)
        if self._samples.may_jump:
            judged |= self._judge_with_jumps(judged)
        judged |= self._judge_repeatedly(judged, cut)
        if cut and all(judged[name].passed for name in names if name not in cut):
            return judged | self.judge(cut)  # what ended the sampling passes by repetition
        return judged

    def _judge_with_samples(self, names: list[str]) -> tuple[dict[str, Judgement], list[str]]:
        """Returns the judgements with the floors 5 and 6, and the values that were given fewer samples."""
        run, in_order = self._run, self._samples.in_order
        cut = self._sample_noise(self._samples.torch, names)
        judged = {name: run.judge(name) for name in names}
        still_over = [name for name in names if judged[name].is_over]
        if in_order is not None and still_over:
            cut = self._sample_noise(in_order, still_over)
            judged |= {name: replace(run.judge(name), plain_ratio=judged[name].ratio) for name in still_over}
        return judged, cut

    def _sample_noise(self, sample: Callable[[int], Values], pending: list[str]) -> list[str]:
        """Sets the noise of values to the RMS error of `count` samples; returns those that were given fewer."""
        squares: dict[str, Floats] = {}  # only sums are kept, because a sample may have all activations of a model
        failed: list[str] = []
        for index in range(self._count):
            values, exact = sample(index), self._reference(index)
            for name in pending:
                squares[name] = squares.get(name, 0.0) + squared_distance(values[name].array, exact[name].array)
            if index + 1 == self._count or index + 1 in LIMITS:
                self._run.noises.update({name: np.sqrt(squares[name] / (index + 1)) for name in pending})
                limit = LIMITS.get(index + 1, math.inf)
                failed += [name for name in pending if self._run.judge(name).ratio > limit]
                pending = [name for name in pending if name not in failed]
                if not self._needed(pending, failed, index + 1):
                    return pending if index + 1 < self._count else []
        return []

    def _judge_with_jumps(self, judged: Mapping[str, Judgement]) -> dict[str, Judgement]:
        """Returns the judgements of the gradients that jump between nearby problems (floor 7)."""
        run, found = self._run, {}
        for name, judgement in judged.items():
            if not judgement.is_over or not _is_gradient(name):
                continue
            jump = self._nearby_distance(name)
            if rms(jump) > max(FACTOR * judgement.noise, JUMP * judgement.scale):
                run.noises[name] = np.maximum(jump, run.noises[name])
                found[name] = run.judge(name)
        return found

    def _nearby_distance(self, name: str) -> Floats:
        exact = self._run.reference[name].array
        squares = [squared_distance(self._reference(index)[name].array, exact) for index in range(FEW)]
        distance: Floats = np.sqrt(np.mean(squares, axis=0))
        return distance

    def _judge_repeatedly(self, judged: Mapping[str, Judgement], cut: list[str]) -> dict[str, Judgement]:
        """Returns the medians of the values over the tolerance when MLX solves nearby problems, too.

        Args:
            judged: The judgements with all floors.
            cut: The values that were given fewer samples. They do not end the repetitions.
        """
        repeats = {name: [judgement] for name, judgement in judged.items() if judgement.is_over}
        for index in range(REPEATS):
            undecided = [name for name, judgements in repeats.items() if not _is_decided(judgements)]
            decided = [name for name in repeats if name not in (*undecided, *cut)]
            failed = [name for name in decided if not median(repeats[name]).passed]
            if self._samples.mlx is None or not self._needed(undecided, failed, FEW):
                break
            run, exact_run = self._samples.mlx(index), self._reference(index)
            for name, judgements in repeats.items():
                # the error there, at the reference here
                value, exact = (np.asarray(values[name].array, np.float64) for values in (run, exact_run))
                with np.errstate(invalid="ignore"):
                    error = value - exact
                    moved = np.where(np.isfinite(error), self._run.reference[name].array + error, value)
                judgements.append(self._run.judge(name, moved))
        return {name: median(judgements) for name, judgements in repeats.items()}


def _needed_for_worst(pending: list[str], failed: list[str], count: int) -> bool:
    """Returns whether an undecided result of a replay can still become the worst one."""
    if any(map(_is_output, failed)):
        return False
    return any(map(_is_output, pending)) if failed else bool(pending)


def _needed_for_verdict(pending: list[str], failed: list[str], count: int) -> bool:
    """Returns whether values need more than `count` samples: FEW are enough once one is over the tolerance."""
    return bool(pending) and not (failed and count >= FEW)


def _is_output(name: str) -> bool:
    return name.partition("[")[0] == "output"


def _kept(run: Callable[[int], Values], names: list[str]) -> Callable[[int], Values]:
    """Returns a function that computes each of the first samples once, and keeps the values with these names."""
    kept: dict[int, Values] = {}

    def values_of(index: int) -> Values:
        if index in kept:
            return kept[index]
        values = run(index)
        if index < FEW:
            kept[index] = {name: values[name] for name in names}
        return values

    return values_of


def _is_decided(judgements: list[Judgement]) -> bool:
    """Returns whether more than half of REPEATS + 1 runs pass, or fail."""
    if len(judgements) >= 3 and all(judgement.ratio > REPEAT_LIMIT for judgement in judgements):
        return True
    passed = sum(judgement.passed for judgement in judgements)
    return max(passed, len(judgements) - passed) > REPEATS // 2


def median(judgements: list[Judgement]) -> Judgement:
    """Returns the median; the larger of the middle two, unless most of the judgements pass."""
    ranked = sorted(judgements, key=lambda judgement: judgement.ratio)
    return ranked[len(ranked) // 2]


def gradient_rms(gradients: Values) -> dict[str, float]:
    """Returns the RMS of all gradients of each layer, by module path (floor 3). `gradients` are by parameter path."""
    sums: dict[str, tuple[float, int]] = {}
    for path, value in gradients.items():
        squares, size = sums.get(_parent(path), (0.0, 0))
        sums[_parent(path)] = squares + rms(value.array) ** 2 * value.array.size, size + value.array.size
    return {path: math.sqrt(squares / size) if size else 0.0 for path, (squares, size) in sums.items()}


def _loss_noise(torch: Values, reference: Values) -> float:
    """Returns floor 4: the noise of the logits over the square root of the number of labels."""
    if "module:" not in torch or "input:labels" not in torch:
        return 0.0
    num_labels = int(np.count_nonzero(torch["input:labels"].array >= 0))
    noise = torch["module:"].array.astype(np.float64) - reference["module:"].array
    return rms(noise) / math.sqrt(max(num_labels, 1))


def _is_gradient(name: str) -> bool:
    return name.startswith("gradient:")


def _path(name: str) -> str:
    return name.partition(":")[2]


def _parent(name: str) -> str:
    """Returns the path of the module that holds a parameter, given its path or its name."""
    return (_path(name) or name).rpartition(".")[0]
