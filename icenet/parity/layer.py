"""Judges what one layer computes in a replay: all sides call it with the same inputs and cotangents.

Where a layer has no derivative, both frameworks may be right with different gradients (`icenet.parity.ties`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import rng
from icenet.parity.align import ReplayError
from icenet.parity.aligned_traces import AlignedReplay
from icenet.parity.fp16 import Replay, scaled_for_fp16
from icenet.parity.measures import half_ulp, is_binary, rms, round_to
from icenet.parity.resampling import Samples, Values, judge_values
from icenet.parity.ties import Ties, may_be_kinks, moved_apart
from icenet.parity.trace import Call, Trace, Value
from icenet.parity.yardstick import FACTOR, Judgement

Array = npt.NDArray[Any]

SampledReplay = Callable[[int, str, Call, list[Value] | None], dict[str, Value]]
"""The same in the sample with the given number (see `icenet.parity.resampling`)."""


def replay_layer(
    path: str,
    torch: Trace,
    reference: Trace,
    replays: tuple[AlignedReplay, Replay, Replay],
    dtype: str = "fp32",
    samples: Samples[SampledReplay] | None = None,
    is_leaf: bool = True,
) -> tuple[Judgement, str, bool]:
    """Replays one layer.

    All replays receive the same: the inputs of the reference, rounded to the dtypes that PyTorch had there, and
    cotangents drawn from a normal distribution, in fp16 small enough for its range. If only gradients are over the
    tolerance and the reference's have a jump at the inputs, the inputs are moved apart and the result there decides,
    and for a layer without others within it, the sums of the gradients of equal inputs (`icenet.parity.ties`).

    If an output is over the tolerance, gradients are not considered: their difference is a consequence.

    Returns:
        The worst judgement, the name of its value (`output`, `input 0`, ...), and whether gradients are within the
        tolerance only where the inputs were moved apart.
    """
    dtypes = iter(value.dtype for value in torch.calls[path].values)

    def rounded(exact: Value) -> Value:
        stored = next(dtypes)
        return Value(round_to(exact.array, stored), stored) if exact.is_float else exact

    call = reference.calls[path].map(rounded)
    cotangents = []
    for name, output in torch.outputs(path).items():
        if not output.is_float:  # integers have no gradient
            cotangents.append(Value(np.zeros_like(output.array), output.dtype))
            continue
        values = rng.normal(rng.key(0, "cotangent", name), output.array.shape)
        cotangents.append(Value(round_to(values, output.dtype), output.dtype))
    found, has_ties = judge_layer(path, call, cotangents, replays, dtype, samples, is_leaf)
    return *_worst(found), has_ties


def judge_layer(
    path: str,
    call: Call,
    cotangents: list[Value] | None,
    replays: tuple[AlignedReplay, Replay, Replay],
    dtype: str = "fp32",
    samples: Samples[SampledReplay] | None = None,
    is_leaf: bool = True,
    quick: Callable[[str], Array | None] | None = None,
    ties: bool = True,
) -> tuple[dict[str, Judgement], bool]:
    """Judges all results of one layer in its replay; see `replay_layer`.

    Args:
        path: Path of the layer.
        call: The arguments of all replays.
        cotangents: Of the outputs; None to replay the forward pass alone.
        replays: Replays by MLX, PyTorch and the reference.
        dtype: Compute dtype under test.
        samples: Replays in a sample.
        is_leaf: Whether no other layer is within it.
        quick: Returns the noise of a result whose sums are taken term by term, if it is known without a replay. If it
            is given, values pass that are far within that noise, or within that of the first sample: most values over
            the tolerance are such sums, which all samples would show as well.
        ties: Whether inputs may be moved apart where they are equal.

    Returns:
        The judgement of each result by name (`output`, `input 0`, `gradient:weight`, ...), and whether gradients are
        within the tolerance only where the inputs were moved apart.
    """
    if cotangents is not None:
        cotangents = replays[0].cotangents(path, cotangents)
        if dtype == "fp16":
            cotangents = scaled_for_fp16(path, call, cotangents, replays)
    judge = _LayerJudge(path, cotangents, replays, dtype, samples, quick)
    found = judge.once(call)
    over = [name for name, judgement in found.items() if judgement.is_over]
    is_backward = any(not name.startswith(("output", "statistic")) for name in over)
    if cotangents is None or not (ties and is_backward and _may_be_kink(call)):
        return judge.judge_over(call, found) if over else found, False
    if passing := judge.judge_known(found):
        return passing, False
    at_ties = _Replays(path, call, cotangents, replays)
    if at_ties.has_inputs and not at_ties.ties.are_kinks:
        return judge.judge_over(call, found), False
    return _judge_apart(judge, at_ties, call, found, is_leaf)


def _judge_apart(
    judge: _LayerJudge, at_ties: _Replays, call: Call, found: dict[str, Judgement], is_leaf: bool
) -> tuple[dict[str, Judgement], bool]:
    """Judges a layer whose gradients are over the tolerance at ties: at inputs that are moved apart, and their sums.

    Args:
        judge: Judges the layer.
        at_ties: Its replays at the ties.
        call: The arguments, with ties.
        found: The judgements there by one run.
        is_leaf: Whether no other layer is within it.

    Returns:
        See `judge_layer`.
    """
    # samples break exact ties at random, which would count as noise, so only outputs are sampled there
    if any(judgement.is_over for name, judgement in found.items() if name.startswith("output")):
        found = found | {n: j for n, j in judge.sampled(call).items() if n.startswith("output")}
    worst, part = _worst(found)
    if part.startswith("output") or not worst.is_over:
        return found, False
    nearby = _apart(judge.path, call)
    moved = judge.without_edges(nearby, judge.sampled(nearby))
    passed = _worst(moved)[0].passed
    is_larger = any(found[name].error > FACTOR * moved[name].noise for name in found if name in moved)
    if passed and is_leaf and at_ties.has_inputs:
        judgement = at_ties.judge_sums(nearby, judge.dtype, judge.samples)
        if not judgement.passed:
            return {"input, at ties": judgement}, False
    return moved, passed and is_larger


def _apart(path: str, call: Call) -> Call:
    """Returns the arguments of a call of a layer, in which equal values are moved apart by a few ulps."""
    numbers = count()

    def apart(value: Value) -> Value:
        key = rng.key(0, "ties", path, next(numbers))
        if not value.is_float or is_binary(value.array):
            return value
        return Value(round_to(moved_apart(value.array, value.dtype, key), value.dtype), value.dtype)

    return call.map(apart)


class _LayerJudge:
    """Judges the results of one layer, with as many replays as are needed. The arguments: see `judge_layer`."""

    def __init__(
        self,
        path: str,
        cotangents: list[Value] | None,
        replays: tuple[AlignedReplay, Replay, Replay],
        dtype: str,
        samples: Samples[SampledReplay] | None,
        quick: Callable[[str], Array | None] | None,
    ) -> None:
        self.path, self.dtype, self.samples = path, dtype, samples
        self._cotangents, self._replays, self._quick = cotangents, replays, quick

    def once(self, call: Call) -> dict[str, Judgement]:
        """Returns the judgements by one run."""
        return _judge_replay(self.path, call, self._cotangents, self._replays, self.dtype, None)

    def sampled(self, call: Call) -> dict[str, Judgement]:
        """Returns the judgements with the noise of samples, if there are any."""
        return _judge_replay(self.path, call, self._cotangents, self._replays, self.dtype, self.samples)

    def judge_over(self, call: Call, found: dict[str, Judgement]) -> dict[str, Judgement]:
        """Returns the judgements of values of which some are over the tolerance by one run.

        Args:
            call: The arguments, at which the layer has a derivative.
            found: The judgements by one run.
        """
        if self.samples is None:
            return found
        passing = self.judge_known(found) or (self._judge_quickly(call, found) if self._quick else None)
        return passing or self.without_edges(call, self.sampled(call))

    def judge_known(self, found: Mapping[str, Judgement]) -> dict[str, Judgement] | None:
        """Returns the judgements if every value is far within a noise known without a replay (`quick`), else None."""
        if self._quick is None or self.samples is None or self.samples.in_order is None:
            return None
        passing = dict(found)
        for name, judgement in found.items():
            if judgement.passed:
                continue
            noise = self._quick(name) if judgement.is_over else None
            size = 0.0 if noise is None else rms(noise)
            # a single wrong element would have a peak that is far larger than the RMS
            is_spread = judgement.peak_ratio <= FACTOR / 2 * judgement.rms_ratio
            if not is_spread or judgement.error > FACTOR / 2 * size:
                return None
            ratio = judgement.error / size
            passing[name] = replace(judgement, rms_ratio=ratio, peak_ratio=ratio, plain_ratio=judgement.ratio)
        return passing

    def _judge_quickly(self, call: Call, found: Mapping[str, Judgement]) -> dict[str, Judgement] | None:
        """Returns the judgements if every value is far within the noise of the first sample, else None."""
        samples = self.samples
        assert samples is not None
        run = samples.in_order or samples.torch
        if not all(judgement.passed or judgement.is_over for judgement in found.values()):
            return None
        sampled, nearby_exact = (
            _named(replay(0, self.path, call, self._cotangents)) for replay in (run, samples.reference)
        )
        ours, exact = (_named(self._replays[side](self.path, call, self._cotangents)) for side in (0, 2))
        noises = {}
        passing = dict(found)
        for name, value in exact.items():
            if name in found and value.is_float and name in sampled and name in nearby_exact:
                distance = np.asarray(sampled[name].array, np.float64) - nearby_exact[name].array
                noises[name] = Value(
                    value.array + np.where(np.isfinite(distance), distance, 0.0), sampled[name].dtype
                )
        judged = judge_values(ours, noises, {name: exact[name] for name in noises}, self.dtype)
        for name, judgement in found.items():
            if judgement.is_over:
                if name not in judged or judged[name].ratio > FACTOR / 2:
                    return None
                plain = judgement.ratio if samples.in_order else 0.0
                passing[name] = replace(judged[name], plain_ratio=plain)
        return passing

    def without_edges(self, call: Call, found: dict[str, Judgement]) -> dict[str, Judgement]:
        """Returns the judgements without the gradients at inputs that are within a rounding of an edge.

        In half precision the next number below 3 plus 3 is 6, so that the gradient of hardswish by MLX is that of the
        other side of its edge. So if only gradients are over the tolerance, the reference computes the gradients two
        ulps above and below the inputs. An error counts as none where it is within the jump between them, and the
        jump is over the tolerance. Of a smooth layer no element has such a jump.
        """
        over = [name for name, judgement in found.items() if judgement.is_over]
        if self.samples is None or self._cotangents is None or self.dtype == "fp32":
            return found
        if not over or any(name.startswith("output") for name in over):
            return found
        jumps = self._jumps(call, over)
        least = {name: FACTOR * found[name].noise for name in jumps}
        edges = {name: np.where(jump > least[name], jump + least[name], 0.0) for name, jump in jumps.items()}
        if not any(edge.any() for edge in edges.values()):
            return found
        once = replace(self.samples, mlx=None)
        return _judge_replay(self.path, call, self._cotangents, self._replays, self.dtype, once, edges)

    def _jumps(self, call: Call, names: list[str]) -> dict[str, Array]:
        """Returns how far gradients of the reference are from those two ulps above and below the inputs."""

        def exact(at: Call) -> dict[str, Value]:
            return _named(self._replays[2](self.path, at, self._cotangents))

        here = exact(call)
        jumps = {name: np.zeros(here[name].array.shape) for name in names if name in here}
        for sign in (2, -2):

            def moved(value: Value, sign: int = sign) -> Value:
                if not value.is_float:
                    return value
                finite = np.isfinite(value.array)
                ulps = 2 * sign * half_ulp(np.where(finite, value.array, 0.0), value.dtype)
                return replace(value, array=round_to(np.where(finite, value.array + ulps, value.array), value.dtype))

            there = exact(call.map(moved))
            for name, jump in jumps.items():
                distance = np.abs(np.asarray(there[name].array, np.float64) - here[name].array)
                jumps[name] = np.maximum(jump, np.where(np.isfinite(distance), distance, 0.0))
        return jumps


class _Replays:
    """Replays of a layer at inputs with ties, with the sizes of the cotangents (see `icenet.parity.ties`).

    Args:
        path, call, cotangents: See `icenet.parity.configuration.engines.replay`.
        replays: Replays by MLX, PyTorch and the reference.
    """

    def __init__(
        self, path: str, call: Call, cotangents: list[Value], replays: tuple[AlignedReplay, Replay, Replay]
    ) -> None:
        self._path, self._call, self._replays = path, call, replays
        self._cotangents = [Value(np.abs(value.array), value.dtype) for value in cotangents]
        results = replays[0].comparable(path, self._named(replays[2], call))
        floats = [value.array for value in call.values if value.is_float]
        # a mask that is a number on one side only has no gradient to compare
        known = [index for index in range(len(floats)) if f"input {index}" in results]
        self._inputs = [index for index in known if not is_binary(floats[index])]
        self.has_inputs = bool(self._inputs)
        self.ties = Ties([floats[index] for index in self._inputs], self._exact_gradients)

    def judge_sums(self, nearby: Call, dtype: str, samples: Samples[SampledReplay] | None) -> Judgement:
        """Returns the judgement of the sums of the gradients of equal inputs.

        Args:
            nearby: The call at which the noise is sampled, without ties.
            dtype: Compute dtype under test.
            samples: Replays in a sample.
        """
        ours, theirs, exact = (self._sums(self._named(replay, self._call)) for replay in self._replays)
        low, high = self.ties.bounds()
        valid = np.clip(ours.array, low, high)
        noise = theirs.array - exact.array

        def sampled(replay: SampledReplay) -> Callable[[int], Values]:
            return lambda index: {"": self._sums(replay(index, self._path, nearby, self._cotangents))}

        used = replace(samples, mlx=None, in_order=None).map(sampled) if samples else None
        found, expected, reference = (
            {"": Value(array, theirs.dtype)} for array in (ours.array, valid + noise, valid)
        )
        return judge_values(found, expected, reference, dtype, used)[""]

    def _named(self, replay: AlignedReplay | Replay, call: Call) -> dict[str, Value]:
        return replay(self._path, call, self._cotangents)

    def _exact_gradients(self, inputs: list[Array]) -> list[Array]:
        floats = iter([value.array for value in self._call.values if value.is_float])
        given = dict(zip(self._inputs, inputs, strict=True))
        numbers = count()

        def fill(value: Value) -> Value:
            return Value(given.get(next(numbers), next(floats)), value.dtype) if value.is_float else value

        results = self._named(self._replays[2], self._call.map(fill))
        return [results[f"input {index}"].array for index in self._inputs]

    def _sums(self, results: Mapping[str, Value]) -> Value:
        found = [results[f"input {index}"] for index in self._inputs]
        return Value(self.ties.sums([value.array for value in found]), found[0].dtype)


def _judge_replay(
    path: str,
    call: Call,
    cotangents: list[Value] | None,
    replays: tuple[AlignedReplay, Replay, Replay],
    dtype: str,
    samples: Samples[SampledReplay] | None,
    edges: Mapping[str, Array] | None = None,
) -> dict[str, Judgement]:
    """Returns the judgement of each result of a layer on the same arguments and cotangents.

    Args:
        edges: Errors that count as none, for each element of some results.
    """
    theirs, exact = (_named(replay(path, call, cotangents)) for replay in replays[1:])
    exact = replays[0].comparable(path, exact)
    try:
        ours = _named(replays[0](path, call, cotangents))
    except ReplayError as error:
        return {"output": Judgement.incomparable(str(error))}
    for name, edge in (edges or {}).items():
        value, own = exact[name].array, np.asarray(ours[name].array)
        ours[name] = replace(ours[name], array=np.where((edge > 0) & (np.abs(own - value) <= edge), value, own))
    missing = [name for name in exact if name not in ours or name not in theirs]
    if missing:
        return {missing[0]: Judgement.incomparable(f"no {_part(missing[0])} on one backend")}

    def named(replay: SampledReplay) -> Callable[[int], Values]:
        return lambda index: _named(replay(index, path, call, cotangents))

    def aligned(replay: SampledReplay) -> SampledReplay:
        return lambda index, *arguments: replays[0].by(partial(replay, index))(*arguments)

    if samples is not None and samples.mlx is not None:
        samples = replace(samples, mlx=aligned(samples.mlx))
    integers = {
        name: judge_integers(ours[name], theirs[name], value) for name, value in exact.items() if not value.is_float
    }
    drawn = [value for value in cotangents or () if value.is_float]
    # smaller derivatives may be flushed to zero in fp16, and are differences of roundings in bf16
    resolution = {"fp16": 2.0**-14, "bf16": 2.0**-16}.get(dtype, 2.0**-52)
    floor = resolution * max((rms(value.array) for value in drawn if np.isfinite(value.array).all()), default=0.0)
    output_floor = 2.0**-18 if dtype == "fp16" else 0.0  # a sigmoid whose exponential overflows is 0
    nearby = samples.map(named) if samples else None
    found = judge_values(
        ours, theirs, exact, dtype, nearby, only_worst=True, gradient_floor=floor, output_floor=output_floor
    )
    return {**found, **integers}


def judge_integers(ours: Value, theirs: Value, exact: Value) -> Judgement:
    """Judges integers or booleans: each must be PyTorch's or the reference's, which rounding may make unequal."""
    a, b, r = ours.array, theirs.array, exact.array
    if a.shape != r.shape or b.shape != r.shape:
        return Judgement.incomparable(f"shape {list(a.shape)} in MLX, {list(b.shape)} in PyTorch")
    wrong = int(((a != b) & (a != r)).sum())
    return Judgement.incomparable(f"{wrong} of {r.size} values are other integers") if wrong else _EQUAL


_EQUAL = Judgement(0.0, 0.0, 0.0, 0.0)


def _may_be_kink(call: Call) -> bool:
    """Returns whether a layer may have no derivative at the arguments of a call."""
    return any(may_be_kinks(value.array) for value in call.values if value.is_float)


def _worst(judgements: dict[str, Judgement]) -> tuple[Judgement, str]:
    """Returns the worst judgement of a replay and the name of its value; an output if one is over the tolerance."""
    worst, part = Judgement(0.0, 0.0, 0.0, 0.0), "output"
    for name, judgement in judgements.items():
        output_failed = part.startswith("output") and not worst.passed
        if judgement.ratio > worst.ratio and (name.startswith("output") or not output_failed):
            worst, part = judgement, _part(name)
    return worst, part


def _named(replayed: dict[str, Value]) -> dict[str, Value]:
    """Returns the values of a replay with the names of gradients as in a trace: `gradient:PARAMETER`."""
    return {name.replace("gradient ", "gradient:", 1): value for name, value in replayed.items()}


def _part(name: str) -> str:
    return name.replace("gradient:", "gradient ", 1)
