"""The parity criterion for all values of a run: outputs, losses, gradients, replays, optimizer steps, training steps.

`judge_values` judges each value by `icenet.parity.yardstick`, which has the floors 1 to 4. Those over the tolerance
are judged again, with more samples of the noise and the error:

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
    13 times with one draw, and once in 270,000 times with 12. Neither number depends on the processor. The squared
    ratio of m numbers has an F distribution with m and 12 m degrees of freedom, so that several exceed FACTOR less
    often. Where few numbers exceed it more often, the errors are not equally large (floor 6).

6.  Sums of n terms in fp32. PyTorch takes them in many partial sums or in float64, MLX mostly term by term. Then the
    rounding error grows with sqrt(n): 20 times PyTorch's for the statistics of a plain `mlx.nn.BatchNorm` over 16
    images of 32x32, 24 times for the bias gradient of a plain `mlx.nn.Linear` over 8192 tokens. IceNet's own layers
    avoid this and are not granted this floor where IceNet's models are compared. For MLX's own layers, for a user's
    code and in `compare`, if a ratio exceeds FACTOR with floor 5, the samples are taken again with all sums of
    PyTorch term by term, also those within its norms, softmax and bias gradients, and products that have few results
    of many terms, such as the gradient of a convolution by its weight (`icenet_torch.tools.sums`): the order there
    depends on the processor, the BLAS and the strides. The roundings of a long sum hardly depend on the last bits of
    its terms, so the sums of each sample begin at another term. A value that then passes is reported as less exact,
    with the ratio without this floor (`plain_ratio`). A wrong eps, momentum or variance is much larger. The error
    function in fp32 is moved by up to an ulp of 1 in these samples, as MLX's is. Its errors, and those of GELU, are
    up to 4e-7 on a CPU, PyTorch's 3e-8. `exp` has the errors of MLX's as well, and so has the gradient of a
    softmax. Attention is computed by its operations, not by a fused kernel. Functions of constants and integers, such
    as the angles of positions, are rounded again in each of these samples: nearby problems do not move them.

7.  Jumps. A large model has values that are within rounding of the edge of a ReLU, and a gradient jumps if a rounding
    moves one across: in ResNeXt-101 with random weights by 1e-2 of its size, in every second run of either framework.
    The few samples of a port may all miss it. So if a gradient of a port exceeds FACTOR with the floors above, its
    floor is the RMS distance between the references of FEW nearby problems and r, if that is a jump: over FACTOR
    times the noise, and over JUMP of the gradient, 500 times what a change of 4 ulps is of a value. Sums term by term
    move more values across an edge: with MLX's own batch norms, a gradient of a ResNeXt of 6 blocks jumps in every
    second problem. So if a gradient is over FACTOR after the repetitions as well, the jumps of PyTorch with such sums
    are sampled, in FEW of the problems that are repeated. A wrong computation does not make PyTorch jump. These jumps
    may be below JUMP if MLX passes in one of the repetitions, since a wrong computation is wrong in each: a max
    pooling passes a gradient to one place, so that a near tie moves one row of a weight, in S3D by 1e-5 of the
    largest value, and in two of three problems there is such a tie. If PyTorch has such a jump in one sample alone,
    it is that of MLX only at the same elements: some elements may be wrong next to one that jumps by chance.

8.  Maxima that a softmax subtracts. They do not change its result, but the gradient of a maximum takes the rounding
    errors of the terms back: in an attention over the edges of a graph the gradient of what all edges of a node share
    is 20 times more exact with the maximum of each node than with that of all scores. So if only gradients of a
    replay in fp32 are over the tolerance, and the reference computes the same gradients, to 2^-40, with maxima that
    are constants, the noise is sampled with such maxima.

Early end: sampling ends for a value that passes after k samples with a ratio up to FACTOR sqrt(k / SAMPLES). The sum
of the squared distances only grows, so after all samples the noise is at least sqrt(k / SAMPLES) times as large, and
the value passes for certain (`sure_limit`). Most values have a ratio of 1 to 3, and end after 1 to 3 samples.

Sampling also ends for a value with a large ratio, above 400 after 3 samples, 100 after 4, 52 after 6, 32 after
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
decides. (Not for the update of a training step.) For the gradients of a port these are problems further away, so that
no value is within rounding of the same edge (`icenet.parity.ports.pair`).

FACTOR stays the same; the noise and the error are only measured with more samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from icenet.parity.measures import Floats, rms, squared_distance
from icenet.parity.trace import Value
from icenet.parity.yardstick import FACTOR, Judgement, judge

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

Values = Mapping[str, Value]
"""Values by `KIND:PATH`, as in a trace."""

F = TypeVar("F", covariant=True)
G = TypeVar("G")


def sure_limit(count: int, samples: int | None = None) -> float:
    """Returns the ratio after `count` samples up to which a value passes after all `samples` (default: SAMPLES)."""
    return FACTOR * math.sqrt(count / (samples or SAMPLES))


@dataclass(frozen=True)
class Samples(Generic[F]):
    """Functions that solve nearby problems. The first argument of each is the number of the sample.

    Attributes:
        reference: By PyTorch in float64.
        torch: By PyTorch in the dtype under test, perturbed (floor 5).
        mlx: By MLX; None if a value is judged by its only run.
        in_order: By PyTorch that sums term by term, perturbed (floor 6); None for IceNet's own layers.
        repeated: By PyTorch in float64, the problems that `mlx` solves; None if they are those of `reference`.
        jumping: By PyTorch that sums term by term, the problems of `repeated` (floor 7); None without.
        count: The largest number of samples; None for SAMPLES.
        may_jump: Whether the gradients are those of a whole model, which may jump (floor 7).
        in_order_first: Whether floor 6 is tried before floor 5. What passes with one of them passes in either order;
            where most values need floor 6, fewer runs are enough.
    """

    reference: F
    torch: F
    mlx: F | None = None
    in_order: F | None = None
    repeated: F | None = None
    jumping: F | None = None
    count: int | None = None
    may_jump: bool = False
    in_order_first: bool = False

    def few(self) -> Samples[F]:
        """Returns FEW samples without repetitions, for values whose judgement does not change the verdict."""
        return replace(self, mlx=None, count=min(FEW, SAMPLES))

    def map(self, function: Callable[[F], G]) -> Samples[G]:
        """Returns the results of a function for each field that is not None."""
        mlx, in_order, repeated, jumping = (
            None if item is None else function(item)
            for item in (self.mlx, self.in_order, self.repeated, self.jumping)
        )
        return Samples(
            function(self.reference),
            function(self.torch),
            mlx,
            in_order,
            repeated,
            jumping,
            self.count,
            self.may_jump,
            self.in_order_first,
        )


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
    """Compares the float values that all three runs have, by the criterion.

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
        layer_rms = self._layer_rms[_parent(name)] if _is_gradient(name) else 0.0
        judged = functools.partial(
            judge,
            self.mlx[name].array if array is None else array,
            self.torch[name].array,
            self.reference[name].array,
            self._dtype,
            stored=self.torch[name].dtype,
            layer_rms=layer_rms,
            min_noise=self._min_noise(name),
            sampled_noise=self.noises.get(name),
        )
        judgement = judged()
        if judgement.is_over and layer_rms:
            return judged(layer_noise=self._noise_of_layer(_parent(name)))
        return judgement

    def _noise_of_layer(self, path: str) -> tuple[float, float]:
        """Returns the RMS and the largest value of the noise of all gradients of a layer."""
        squares = [
            squared_distance(self.torch[name].array, exact.array).reshape(-1)
            for name, exact in self.reference.items()
            if _is_gradient(name) and _parent(name) == path and name in self.torch
        ]
        every = np.concatenate([np.zeros(0), *squares])
        return (math.sqrt(every.mean()), math.sqrt(every.max())) if every.size else (0.0, 0.0)

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
        self._passed_once: set[str] = set()
        """The values over the tolerance that pass in one of the repetitions or more."""

    def judge(self, names: list[str]) -> dict[str, Judgement]:
        judged, cut = self._judge_with_samples(names)
        if self._samples.may_jump:
            judged |= self._judge_with_jumps(judged)
        judged |= self._judge_repeatedly(judged, cut)
        judged |= self._judge_with_jumps_in_order(judged)
        if cut and all(judged[name].passed for name in names if name not in cut):
            return judged | self.judge(cut)  # what ended the sampling passes by repetition
        return judged

    def _judge_with_samples(self, names: list[str]) -> tuple[dict[str, Judgement], list[str]]:
        """Returns the judgements with the floors 5 and 6, and the values that were given fewer samples."""
        run, in_order = self._run, self._samples.in_order
        if in_order is not None and self._samples.in_order_first:
            return self._judge_in_order_first(in_order, names)
        cut = self._sample_noise(self._samples.torch, names)
        judged = {name: run.judge(name) for name in names}
        still_over = [name for name in names if judged[name].is_over]
        if in_order is not None and still_over:
            cut = self._sample_noise(in_order, still_over)
            judged |= {name: replace(run.judge(name), plain_ratio=judged[name].ratio) for name in still_over}
        return judged, cut

    def _judge_in_order_first(
        self, in_order: Callable[[int], Values], names: list[str]
    ) -> tuple[dict[str, Judgement], list[str]]:
        """Does the same with floor 6 before floor 5. The noise of what passes with neither is that of floor 6."""
        run = self._run
        cut = self._sample_noise(in_order, names)
        judged = {name: run.judge(name) for name in names}
        still_over = {name: run.noises[name] for name in names if judged[name].is_over}
        if still_over:
            self._sample_noise(self._samples.torch, list(still_over))
            for name, noise in still_over.items():
                judgement = run.judge(name)
                if judgement.passed:
                    judged[name] = judgement
                else:
                    run.noises[name] = noise
        return judged, cut

    def _sample_noise(self, sample: Callable[[int], Values], pending: list[str]) -> list[str]:
        """Sets the noise of values to the RMS error of samples; returns the undecided ones that were given fewer."""
        squares: dict[str, Floats] = {}  # only sums are kept, because a sample may have all activations of a model
        failed: list[str] = []
        for index in range(self._count):
            values, exact = sample(index), self._reference(index)
            for name in pending:
                squares[name] = squares.get(name, 0.0) + squared_distance(values[name].array, exact[name].array)
            self._run.noises.update({name: np.sqrt(squares[name] / (index + 1)) for name in pending})
            ratios = {name: self._run.judge(name).ratio for name in pending}
            failed += [name for name, ratio in ratios.items() if ratio > LIMITS.get(index + 1, math.inf)]
            passed = [name for name, ratio in ratios.items() if ratio <= sure_limit(index + 1, self._count)]
            pending = [name for name in pending if name not in failed and name not in passed]
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

    def _judge_with_jumps_in_order(self, judged: Mapping[str, Judgement]) -> dict[str, Judgement]:
        """Returns the judgements of the gradients that jump if PyTorch sums term by term (floor 7)."""
        sample, repeated = self._samples.jumping, self._samples.repeated
        found: dict[str, Judgement] = {}
        squares: dict[str, Floats] = {}
        if sample is None or repeated is None:
            return found
        counts: dict[str, int] = {}
        for index in range(FEW):
            over = [name for name, judgement in judged.items() if judgement.is_over and _is_gradient(name)]
            pending = [name for name in over if name not in found]
            if not pending:
                break
            values, exact = sample(index), repeated(index)
            for name in pending:
                square = squared_distance(values[name].array, exact[name].array)
                squares[name] = squares.get(name, 0.0) + square
                edge = FACTOR * judged[name].noise
                counts[name] = counts.get(name, 0) + (math.sqrt(square.mean()) > edge)
                jump: Floats = np.sqrt(squares[name] / (index + 1))
                is_large = rms(jump) > JUMP * judged[name].scale
                if rms(jump) > edge and (is_large or self._may_be_small(name, jump, edge, counts[name])):
                    self._run.noises[name] = np.maximum(jump, self._run.noises[name])
                    judgement = self._run.judge(name)
                    if judgement.ratio <= sure_limit(index + 1, FEW):
                        found[name] = judgement
        return found

    def _may_be_small(self, name: str, jump: Floats, edge: float, count: int) -> bool:
        """Returns whether a small jump of PyTorch may be that of MLX: in two samples, or at the same elements.

        Args:
            name: The value, of which MLX passes in one of the repetitions.
            jump: The RMS of each element over the samples.
            edge: The size of a jump.
            count: The samples with a jump.
        """
        if name not in self._passed_once:
            return False
        reference = self._run.reference[name].array
        elsewhere = np.where(jump > edge, reference, self._run.mlx[name].array)
        return count > 1 or self._run.judge(name, elsewhere).passed

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
            undecided = [name for name, judgements in repeats.items() if not is_decided(judgements)]
            decided = [name for name in repeats if name not in (*undecided, *cut)]
            failed = [name for name in decided if not median(repeats[name]).passed]
            if self._samples.mlx is None or not self._needed(undecided, failed, FEW):
                break
            run, exact_run = self._samples.mlx(index), (self._samples.repeated or self._reference)(index)
            for name, judgements in repeats.items():
                # the error there, at the reference here
                value, exact = (np.asarray(values[name].array, np.float64) for values in (run, exact_run))
                with np.errstate(invalid="ignore"):
                    error = value - exact
                    moved = np.where(np.isfinite(error), self._run.reference[name].array + error, value)
                judgements.append(self._run.judge(name, moved))
        self._passed_once |= {name for name, tried in repeats.items() if any(item.passed for item in tried)}
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


def is_decided(judgements: list[Judgement]) -> bool:
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
