"""Compares three traces value by value and finds the layers at which a difference begins.

After a wrong layer every value is wrong, so the first value over the tolerance shows where a difference is visible,
not where it begins. To find that, each layer is replayed: MLX, PyTorch and the reference call it with the same
inputs, those of the reference, so that a difference in its inputs has no effect. The replay is forward and, with
random cotangents, backward. The marks of a layer:

    differs here    over the tolerance in its replay, and none of the layers within it is
    contains        over the tolerance in its replay, because a layer within it is
    propagated      over the tolerance in the run only: its inputs already differed

Replays also find faults that are smaller than the noise that the earlier layers produce, and faults of the backward
pass alone. Where a layer has no derivative, both frameworks may be right with different gradients. So if only
gradients are over the tolerance and those of the reference have a jump at the inputs, the layer is replayed again at
a nearby point where it has a derivative, and what does not depend on the choice is compared at the inputs
(`icenet.parity.ties`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import rng
from icenet.parity.align import (
    AlignedReplay,
    ReplayError,
    align_trace,
    flattened_input,
    permutation,
    without_counterpart,
)
from icenet.parity.ties import Ties, may_be_kinks, moved_apart
from icenet.parity.trace import Call, Trace, Value
from icenet.parity.yardstick import (
    FACTOR,
    Judgement,
    Samples,
    Values,
    half_ulp,
    judge_values,
    rms,
    round_to,
)

Array = npt.NDArray[Any]

DIFFERS, CONTAINS, PROPAGATED = "differs here", "contains", "propagated"

KINDS = ("module", "loss", "gradient", "statistic", "parameter", "moment")
"""The kinds of values that are compared."""

FP16_SCALES = (1.0, 2.0**-10, 2.0**-20)
"""Scales of the loss and of cotangents in fp16, of which the first without overflow is used."""
FP16_HEADROOM = 8192.0
"""Largest gradient for which a scale is used. The limit of fp16 is 65504; intermediate values may be larger."""

Replay = Callable[[str, Call, list[Value] | None], dict[str, Value]]
"""Calls the layer at a path with arguments and cotangents (None: no gradients): `engines.replay` of one engine."""

SampledReplay = Callable[[int, str, Call, list[Value] | None], dict[str, Value]]
"""The same in the sample with the given number (see `icenet.parity.yardstick`)."""


@dataclass(frozen=True)
class Row:
    """The comparison of one value.

    Attributes:
        kind, path: Name of the value (see `icenet.parity.trace`).
        shape: Shape of the array.
        judgement: Judgement of the value in the run.
        own: The worst judgement in the replay of the layer; None if it was not replayed.
        own_part: The value of that judgement: `output`, `input 0` or `gradient weight` (the backward pass).
        mark: "differs here", "contains", "propagated" or empty.
        note: A remark, such as unequal dtypes.
        remedy: How the value, or the layer's input, is reordered in MLX, if it is, and what to write instead.
        ties: A remark on a layer whose gradients agree except at ties of its inputs, else empty.
    """

    kind: str
    path: str
    shape: tuple[int, ...]
    judgement: Judgement
    own: Judgement | None = None
    own_part: str = ""
    mark: str = ""
    note: str = ""
    remedy: str = ""
    ties: str = ""

    @property
    def passed(self) -> bool:
        """Whether the value is within the tolerance in the run and in the replay, and of equal dtype."""
        return self.judgement.passed and (self.own is None or self.own.passed) and not self.note.startswith("dtype")

    @property
    def ratio(self) -> float:
        """The larger of the ratios in the run and in the replay."""
        return max(self.judgement.ratio, self.own.ratio if self.own else 0.0)

    @property
    def plain_ratio(self) -> float:
        """The larger ratio without the floor of sums term by term, if the row passes because of it; else 0."""
        return max(self.judgement.plain_ratio, self.own.plain_ratio if self.own else 0.0) if self.passed else 0.0


def compare(
    mlx: Trace,
    torch: Trace,
    reference: Trace,
    dtype: str = "fp32",
    kinds: tuple[str, ...] = KINDS,
    samples: Samples[Callable[[int], Trace]] | None = None,
) -> list[Row]:
    """Compares every float value of the reference's trace, in its order.

    Args:
        mlx, torch: Traces in the dtype under test.
        reference: Trace in float64.
        dtype: Compute dtype under test: fp32, bf16 or fp16.
        kinds: Kinds of values to compare.
        samples: Return the trace of sample 0 to SAMPLES - 1 (see `judge_values`).
    """
    mlx, remarks = align_trace(mlx, reference)
    # inputs and logits are needed for the noise of the loss
    wanted = {name: value for name, value in reference.values.items() if name.partition(":")[0] in (*kinds, "input")}
    if "loss" in kinds and "module:" in reference.values:
        wanted["module:"] = reference.values["module:"]

    def aligned(run: Callable[[int], Trace]) -> Callable[[int], Values]:
        return lambda index: align_trace(run(index), reference)[0].values

    aligned_samples = samples.map(aligned) if samples else None
    judgements = judge_values(mlx.values, torch.values, wanted, dtype, aligned_samples)
    rows = []
    left_out = without_counterpart(mlx, reference)
    for name, exact in reference.values.items():
        kind, _, path = name.partition(":")
        if kind not in kinds or not (exact.is_float or kind == "module") or name in left_out:
            continue
        ours, theirs = mlx.values.get(name), torch.values.get(name)
        if ours is None or theirs is None:
            missing = Judgement.incomparable(f"missing in {'MLX' if ours is None else 'PyTorch'}")
            rows.append(Row(kind, path, exact.array.shape, missing, note=missing.note))
            continue
        if not exact.is_float and not ours.is_float:
            judgement = _judge_integers(ours, theirs, exact)
            rows.append(Row(kind, path, exact.array.shape, judgement, note=judgement.note))
            continue
        dtypes = f"dtype {ours.dtype} in MLX, {theirs.dtype} in PyTorch" if ours.dtype != theirs.dtype else ""
        if dtypes and not exact.is_float:
            rows.append(Row(kind, path, exact.array.shape, Judgement.incomparable(dtypes), note=dtypes))
            continue
        note = "; ".join(filter(None, (dtypes, remarks.get(name) or judgements[name].note)))
        remedy = "" if judgements[name].passed or remarks.get(name) else permutation(ours.array, exact.array)
        rows.append(Row(kind, path, exact.array.shape, judgements[name], note=note, remedy=remedy))
    for name, value in mlx.values.items():
        kind, _, path = name.partition(":")
        if kind in kinds and name not in reference.values and name not in left_out:
            extra = Judgement.incomparable("in MLX only")
            rows.append(Row(kind, path, value.array.shape, extra, note=extra.note))
    return rows


def _judge_integers(ours: Value, theirs: Value, exact: Value) -> Judgement:
    """Judges integers or booleans: each must be PyTorch's or the reference's, which rounding may make unequal."""
    a, b, r = ours.array, theirs.array, exact.array
    if a.shape != r.shape or b.shape != r.shape:
        return Judgement.incomparable(f"shape {list(a.shape)} in MLX, {list(b.shape)} in PyTorch")
    wrong = int(((a != b) & (a != r)).sum())
    return Judgement.incomparable(f"{wrong} of {r.size} values are other integers") if wrong else _EQUAL


_EQUAL = Judgement(0.0, 0.0, 0.0, 0.0)


def locate(
    rows_of: Callable[[bool], list[Row]],
    mlx: Trace,
    torch: Trace,
    reference: Trace,
    replays: tuple[Replay, Replay, Replay],
    dtype: str = "fp32",
    samples: Samples[SampledReplay] | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Replays every layer and returns the rows with their marks.

    Args:
        rows_of: Returns the rows by `compare`. Its argument is whether a layer differs in its replay: then few
            samples of the noise decide which values are over the tolerance (see `Samples.few`).
        mlx, torch: Traces in the dtype under test.
        reference: Trace in float64.
        replays: Replays by MLX, PyTorch and the reference.
        dtype: Compute dtype under test.
        samples: Replays in a sample. `in_order` is used for layers that are not IceNet's own.
        on_layer: Called after each layer with the number of replayed layers and of all layers.
    """
    own: dict[str, tuple[Judgement, str]] = {}
    remarks: dict[str, str] = {}
    remedies: dict[str, str] = {}
    ties: dict[str, str] = {}
    aligned = AlignedReplay(replays[0], mlx, reference)
    paths = [path for path in reference.calls if path in torch.calls]
    for index, path in enumerate(paths):
        remarks[path] = aligned.obstacle(path)
        if not remarks[path]:
            remedies[path] = flattened_input(path, mlx, reference)
            # layers come after those within them, and one that contains a difference needs no samples of its noise
            contains = any(not judgement.passed and _is_within(other, path) for other, (judgement, _) in own.items())
            chosen = None if contains else samples
            if chosen and not mlx.has_foreign(path):
                chosen = replace(chosen, in_order=None)
            is_leaf = not any(_is_within(other, path) for other in paths)
            judgement, part, has_ties = replay_layer(
                path, torch, reference, (aligned, *replays[1:]), dtype, chosen, is_leaf
            )
            own[path] = judgement, part
            ties[path] = _tie_remark(mlx.classes.get(path, ""), is_leaf) if has_ties else ""
        if on_layer is not None:
            on_layer(index + 1, len(paths))
    differing = [path for path, (judgement, _) in own.items() if not judgement.passed]
    origins = {path for path in differing if not any(_is_within(other, path) for other in differing)}
    marked = []
    for row in rows_of(bool(differing)):
        layer = row.path if row.kind == "module" else _parent(row.path)
        if row.kind == "module" and row.path in own:
            row = replace(row, own=own[row.path][0], own_part=own[row.path][1], ties=ties[row.path])
        if row.kind == "module" and row.path in remarks:
            own_note = own[row.path][0].note if row.path in own else ""
            notes = dict.fromkeys(filter(None, (row.note, remarks[row.path], own_note)))
            row = replace(row, note="; ".join(notes), remedy=remedies.get(row.path) or row.remedy)
        mark = ""
        if (row.kind == "module" and layer in origins) or (not row.passed and _without_index(layer) in origins):
            mark = DIFFERS
        elif row.kind == "module" and layer in differing:
            mark = CONTAINS
        elif not row.judgement.passed and row.kind in ("module", "gradient", "loss"):
            mark = PROPAGATED
        marked.append(replace(row, mark=mark))
    return marked


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
    judge: Any
    if cotangents is None:
        judge = partial(_judge_replay, path, cotangents=None, replays=replays, dtype=dtype)
        found = judge(call, samples=None)
        if samples and any(judgement.is_over for judgement in found.values()):
            if quick and (passing := _judge_quickly(path, call, None, replays, dtype, samples, found, quick)):
                return passing, False
            found = judge(call, samples=samples)
        return found, False
    cotangents = replays[0].cotangents(path, cotangents)
    if dtype == "fp16":
        cotangents = scaled_for_fp16(path, call, cotangents, replays)
    judge = partial(_judge_replay, path, cotangents=cotangents, replays=replays, dtype=dtype)

    def exact(at: Call) -> dict[str, Value]:
        return replays[2](path, at, cotangents)

    found = judge(call, samples=None)
    if not any(judgement.is_over for judgement in found.values()):
        return found, False
    if (
        quick
        and samples
        and (passing := _judge_quickly(path, call, cotangents, replays, dtype, samples, found, quick))
    ):
        return passing, False
    # samples break exact ties at random, which would count as noise, so only outputs are sampled there
    has_ties = ties and _may_be_kink(call)
    if not has_ties and samples:
        found = _without_edges(judge, exact, call, dtype, samples, judge(call, samples=samples))
    if has_ties and any(judgement.is_over for name, judgement in found.items() if name.startswith("output")):
        found.update({n: j for n, j in judge(call, samples=samples).items() if n.startswith("output")})
    worst, part = _worst(found)
    if part.startswith("output") or not worst.is_over or not has_ties:
        return found, False
    at_ties = _Replays(path, call, cotangents, replays)
    if at_ties.has_inputs and not at_ties.ties.are_kinks:
        if samples:
            found = _without_edges(judge, exact, call, dtype, samples, judge(call, samples=samples))
        return found, False
    numbers = count()

    def apart(value: Value) -> Value:
        key = rng.key(0, "ties", path, next(numbers))
        if not value.is_float:
            return value
        return Value(round_to(moved_apart(value.array, value.dtype, key), value.dtype), value.dtype)

    nearby = call.map(apart)
    moved = judge(nearby, samples=samples)
    if samples:
        moved = _without_edges(judge, exact, nearby, dtype, samples, moved)
    passed = _worst(moved)[0].passed
    is_larger = any(found[name].error > FACTOR * moved[name].noise for name in found if name in moved)
    if passed and is_leaf and at_ties.has_inputs:
        judgement = at_ties.judge_sums(nearby, dtype, samples)
        if not judgement.passed:
            return {"input, at ties": judgement}, False
    return moved, passed and is_larger


def _without_edges(
    judge: Callable[..., dict[str, Judgement]],
    exact: Callable[[Call], dict[str, Value]],
    call: Call,
    dtype: str,
    samples: Samples[SampledReplay],
    found: dict[str, Judgement],
) -> dict[str, Judgement]:
    """Returns the judgements without the gradients at inputs that are within a rounding of an edge.

    In half precision the next number below 3 plus 3 is 6, so that the gradient of hardswish by MLX is that of the
    other side of its edge. So if only gradients are over the tolerance, the reference computes the gradients two
    ulps above and below the inputs. An error counts as none where it is within the jump between them, and the jump is
    over the tolerance. Of a smooth layer no element has such a jump.
    """
    over = [name for name, judgement in found.items() if judgement.is_over]
    if dtype == "fp32" or not over or any(name.startswith("output") for name in over):
        return found
    here = _named(exact(call))
    jumps = {name: np.zeros(here[name].array.shape) for name in over if name in here}
    for sign in (2, -2):

        def moved(value: Value, sign: int = sign) -> Value:
            if not value.is_float:
                return value
            finite = np.isfinite(value.array)
            ulps = 2 * sign * half_ulp(np.where(finite, value.array, 0.0), value.dtype)
            return replace(value, array=round_to(np.where(finite, value.array + ulps, value.array), value.dtype))

        there = _named(exact(call.map(moved)))
        for name, jump in jumps.items():
            distance = np.abs(np.asarray(there[name].array, np.float64) - here[name].array)
            jumps[name] = np.maximum(jump, np.where(np.isfinite(distance), distance, 0.0))
    least = {name: FACTOR * found[name].noise for name in jumps}
    edges = {name: np.where(jump > least[name], jump + least[name], 0.0) for name, jump in jumps.items()}
    if not any(edge.any() for edge in edges.values()):
        return found
    return judge(call, samples=replace(samples, mlx=None), edges=edges)


def _judge_quickly(
    path: str,
    call: Call,
    cotangents: list[Value] | None,
    replays: tuple[AlignedReplay, Replay, Replay],
    dtype: str,
    samples: Samples[SampledReplay],
    found: Mapping[str, Judgement],
    known: Callable[[str], Array | None],
) -> dict[str, Judgement] | None:
    """Returns the judgements if every value is far within the noise of the first sample, else None."""
    run = samples.in_order or samples.torch
    if not all(judgement.passed or judgement.is_over for judgement in found.values()):
        return None
    passing = dict(found)
    is_known = samples.in_order is not None
    for name, judgement in found.items():
        noise = known(name) if judgement.is_over and is_known else None
        size = 0.0 if noise is None else rms(noise)
        # a single wrong element would have a peak that is far larger than the RMS
        is_spread = judgement.peak_ratio <= FACTOR / 2 * judgement.rms_ratio
        is_known = is_known and (judgement.passed or (is_spread and judgement.error <= FACTOR / 2 * size))
        if is_known and judgement.is_over:
            ratio = judgement.error / size
            passing[name] = replace(judgement, rms_ratio=ratio, peak_ratio=ratio, plain_ratio=judgement.ratio)
    if is_known:
        return passing
    sampled, nearby_exact = (_named(r(0, path, call, cotangents)) for r in (run, samples.reference))
    ours, exact = (_named(replay(path, call, cotangents)) for replay in (replays[0], replays[2]))
    noises = {}
    passing = dict(found)
    for name, value in exact.items():
        if name in found and value.is_float and name in sampled and name in nearby_exact:
            distance = np.asarray(sampled[name].array, np.float64) - nearby_exact[name].array
            noises[name] = Value(value.array + np.where(np.isfinite(distance), distance, 0.0), sampled[name].dtype)
    judged = judge_values(ours, noises, {name: exact[name] for name in noises}, dtype)
    for name, judgement in found.items():
        if judgement.is_over:
            if name not in judged or judged[name].ratio > FACTOR / 2:
                return None
            plain = judgement.ratio if samples.in_order else 0.0
            passing[name] = replace(judged[name], plain_ratio=plain)
    return passing


class _Replays:
    """Replays of a layer at inputs with ties, with the sizes of the cotangents (see `icenet.parity.ties`).

    Args:
        path, call, cotangents: See `icenet.parity.engines.replay`.
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
        self._inputs = [index for index in range(len(floats)) if f"input {index}" in results]
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


def fits_fp16(reference: Mapping[str, Array], others: Sequence[Mapping[str, Array]], scale: float = 1.0) -> bool:
    """Returns whether gradients are far enough from the limit of fp16, if the reference's are multiplied by `scale`.

    Whether a gradient near the limit overflows depends on the last bit, so it shows no difference between backends.
    Training reduces the scale of the loss then. Values that are not finite at each scale are a difference.
    """
    largest = max((float(np.abs(array).max(initial=0)) for array in reference.values()), default=0.0)
    finite = (np.isfinite(array).all() for arrays in others for array in arrays.values())
    return largest * scale < FP16_HEADROOM and all(finite)


def scaled_for_fp16(path: str, call: Call, cotangents: list[Value], replays: Sequence[Replay]) -> list[Value]:
    """Returns cotangents, scaled so that no gradient overflows in fp16."""
    for scale in FP16_SCALES:
        scaled = [
            Value(round_to(value.array * scale, value.dtype), value.dtype) if value.is_float else value
            for value in cotangents
        ]
        found = []
        for replay in replays:
            with suppress(ReplayError):  # which is reported where the layer is judged
                results = replay(path, call, scaled).items()
                found.append({name: value.array for name, value in results if not name.startswith("output")})
        if fits_fp16(found[-1], found[:-1]):
            break
    return scaled


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
        name: _judge_integers(ours[name], theirs[name], value) for name, value in exact.items() if not value.is_float
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


def _tie_remark(class_name: str, is_leaf: bool) -> str:
    """Returns what to say of a layer whose gradients agree except at ties, by its class in MLX."""
    if not class_name.startswith("mlx.nn.layers.pooling.Max"):
        remark = "its gradient differs only at ties or edges of its inputs, where it has no derivative"
        return remark if is_leaf else f"{remark}; there it is not judged, because other layers are within it"
    remark = "its gradient differs only at ties: MLX divides it among equal maxima, PyTorch gives it to the first"
    return f"{remark}, as max_pool of icenet.nn does" if class_name.endswith("MaxPool2d") else remark


def _part(name: str) -> str:
    return name.replace("gradient:", "gradient ", 1)


def _parent(path: str) -> str:
    """Returns the path of the module that holds a parameter."""
    return path.rpartition(".")[0]


def _is_within(path: str, parent: str) -> bool:
    return path != parent and (parent == "" or path.startswith(parent + "."))


def _without_index(path: str) -> str:
    """Returns a module's path without the number of its call or output."""
    return path.partition("#")[0].partition("[")[0]
