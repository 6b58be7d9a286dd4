"""Computes each call alone on all sides, on the inputs of the reference, and judges what it computes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.parity import align
from icenet.parity.calls.events import Event
from icenet.parity.calls.pairs import Pair, Replay, Sample, as_floats
from icenet.parity.calls.sides import Side
from icenet.parity.layer import judge_layer
from icenet.parity.measures import rms, rms_distance, squared_distance
from icenet.parity.resampling import FEW, LIMITS, SAMPLES, Samples, sure_limit
from icenet.parity.state import Comparison
from icenet.parity.ties import tie_remark
from icenet.parity.trace import Call, Value
from icenet.parity.yardstick import FACTOR, ZERO, Judgement, judge

Array = npt.NDArray[Any]

_SAME = 0.1
"""Relative distance of a replay of the reference from its run at which the replay computes something else."""


def replay_all(c: Comparison, pairs: list[Pair], backward: Collection[int] = ()) -> dict[int, dict[str, Judgement]]:
    """Returns the judgements of the replay of each call by the number of its event in `b`.

    Args:
        c, pairs: The comparison and the calls.
        backward: Numbers of the calls whose backward pass is replayed, too.
    """
    c.ties = set()
    found = {}
    for index, pair in enumerate(pairs):
        c.tell("modules", index, len(pairs))
        if not pair.obstacle:
            found[pair.b.number] = replay(c, pair, pair.b.number in backward)
    return found


def replay(c: Comparison, pair: Pair, gradients: bool) -> dict[str, Judgement]:
    """Replays one call on all sides, forward and, with `gradients`, backward."""
    given = c.replay_of(pair, gradients)
    pair.parameters = c.reference.parameters_within(pair.path) if gradients else []
    try:
        exact = c.reference.replay(given)
        if pair.children and not _is_same(exact, pair.results("b")):
            raise align.ReplayError("computes something else")
    except align.ReplayError as error:
        if not pair.children:
            pair.obstacle = f"not replayed: b {error}"
            return {}
        pair.children = []  # its calls cannot be left out, because they have other effects
        return replay(c, pair, gradients)
    pair.parameters = [
        name for name in pair.parameters if f"gradient {name}" in exact and c.a.has_parameter(pair, name)
    ]
    judgements, has_ties = judge_replay(c, given, exact)
    for name in _masks_compared(c, given, exact, judgements):
        del judgements[name]
        c.add_notes(["gradients by masks of 1 and 0 among the inputs are not compared: one side has none"])
    for name in _constants(pair) & judgements.keys():
        del judgements[name]
    if has_ties and pair.path not in c.ties:
        c.ties.add(pair.path)
        remark = tie_remark(c.a.classes.get(pair.a.path, ""), pair.is_leaf)
        if remark not in c.notes_of(pair.path):
            c.notes_of(pair.path).append(remark)
    for judgement in judgements.values():
        if judgement.passed and judgement.plain_ratio:
            c.factor = max(c.factor, judgement.plain_ratio / FACTOR)
    return judgements


def _constants(pair: Pair) -> set[str]:
    """Returns the gradients by results of calls that have none in the runs: of what `torch.no_grad` computes."""
    found = set()
    places = ((child, j, i) for child in pair.children for i, j, _ in child.outputs)
    counted = sum(value.is_float for value in pair.inputs("b")[: len(pair.arguments)])
    for child, j, i in places:
        if not child.b.outputs[j].is_float:
            continue
        own = child.a.gradients[i]
        if (
            any(item is not None for item in _root(pair.b).gradients)
            and child.b.gradients[j] is None
            and (own is None or not own.array.any())
        ):
            found.add(f"input {counted}")
        counted += 1
    return found


def _masks_compared(
    c: Comparison, given: Replay, exact: Mapping[str, Value], judgements: Mapping[str, Judgement]
) -> list[str]:
    """Returns the gradients by masks among the inputs of the model that differ because one side has none.

    Multiplied by a mask of 1 and 0, a function has a gradient by it; if the mask is compared with 0, it has none.
    """
    over = {name for name, item in judgements.items() if name.startswith("input ") and not item.passed}
    if not over:
        return []
    known = {id(item) for item in _root(given.pair.b).arguments}
    floats = [item for item in given.pair.inputs("b") if item.is_float]
    over &= {f"input {n}" for n, item in enumerate(floats) if id(item) in known and np.isin(item.array, (0, 1)).all()}
    ours = c.a.replay(given) if over else {}
    return [name for name in over if not (ours[name].array.any() and exact[name].array.any())]


def _root(event: Event) -> Event:
    """Returns the call of the model around a call."""
    while event.parent is not None:
        event = event.parent
    return event


def judge_replay(c: Comparison, given: Replay, exact: Mapping[str, Value]) -> tuple[dict[str, Judgement], bool]:
    """Judges the results of a replay.

    Args:
        c, given: The comparison and the replay.
        exact: What the reference computes in it.

    Returns:
        The judgement of each result by name, and whether gradients agree only where the inputs were moved apart.
    """
    replays = _Replays(c, given, exact)
    judgements, has_ties = judge_layer(
        given.pair.key,
        Call(tuple(given.values)),
        None if given.cotangents is None else list(given.cotangents),
        (replays, replays.noise, replays.exact),  # type: ignore[arg-type]
        c.dtype,
        replays.samples(),
        given.pair.is_leaf,
        quick=lambda name: _bias_noise(given, name),
        ties=c.judges_ties,
    )
    return judgements | _with_cancellation(c, replays, judgements), has_ties


def _with_cancellation(c: Comparison, replays: _Replays, found: Mapping[str, Judgement]) -> dict[str, Judgement]:
    """Returns the judgements of gradients with the noise that they have if maxima of `b` are constants.

    That is so only if the exact gradients are the same then: the code subtracts a maximum that does not change the
    result, as a softmax does, and the errors of terms cancel with those of the gradient of the maximum. Code that
    subtracts another number has these errors.
    """
    over = [name for name, judgement in found.items() if not judgement.passed]
    if not over or c.b.backend != "torch" or not c.computes_reference or c.dtype != "fp32":
        return {}
    if not all(found[name].is_over and name.startswith(("input ", "gradient:")) for name in over):
        return {}
    return replays.judge_without_maxima(over)


class _Replays:
    """The three replays of a call, in the form that `judge_layer` takes.

    Args:
        comparison: The comparison.
        given: The replay.
        found: What the reference computes in it.
    """

    def __init__(self, comparison: Comparison, given: Replay, found: Mapping[str, Value]) -> None:
        self._c, self._pair, self._given = comparison, given.pair, given
        self._found = found
        self._own: dict[str, Value] | None = None

    def __call__(self, path: str, call: Call, cotangents: Any) -> dict[str, Value]:
        is_given = self._is_given(call, cotangents)
        if not is_given or self._own is None:
            found = self._c.a.replay(Replay(self._pair, call.args, cotangents))
            self._own = found if is_given else self._own
            return found
        return self._own

    def noise(self, path: str, call: Call, cotangents: Any) -> dict[str, Value]:
        return self._c.b_replay(Replay(self._pair, call.args, cotangents))

    def exact(self, path: str, call: Call, cotangents: Any) -> dict[str, Value]:
        is_given = self._is_given(call, cotangents)
        found = self._found if is_given else self._c.reference.replay(Replay(self._pair, call.args, cotangents))
        return {name: value for name, value in found.items() if self._is_wanted(name)}

    def _is_given(self, call: Call, cotangents: Any) -> bool:
        """Returns whether these are the arguments and cotangents of the replay, whose results are computed once."""
        return _are_same(call.args, self._given.values) and _are_same(cotangents, self._given.cotangents)

    def _is_wanted(self, name: str) -> bool:
        is_input = name.startswith("input ") and name in self._pair.unknown_gradients()
        return not is_input and (not name.startswith("gradient ") or name[9:] in self._pair.parameters)

    # ---- of an `AlignedReplay` ------------------------------------------------------------------------------

    def by(self, replay: Callable[..., dict[str, Value]]) -> Callable[..., dict[str, Value]]:
        return replay

    def comparable(self, path: str, results: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the results that `a` has, too."""
        statistics = self._c.a.statistics_of(self._pair)
        return {n: v for n, v in results.items() if not n.startswith("statistic ") or n[10:] in statistics}

    def cotangents(self, path: str, drawn: list[Value]) -> list[Value]:
        return drawn

    def samples(self) -> Samples[Any]:
        """Returns the replays in nearby problems."""

        def sampled(side: Side, rounds: bool, in_order: bool = False) -> Callable[..., dict[str, Value]]:
            def sample(index: int, path: str, call: Call, cotangents: Any) -> dict[str, Value]:
                given = Replay(self._pair, call.args, cotangents)
                try:
                    return side.sampled_replay(given, Sample(index, rounds, in_order))
                except align.ReplayError:  # an ulp may make an id of a float another one, outside its table
                    return side.replay(given)

            return sample

        c = self._c
        in_order = sampled(c.b, True, True) if c.b.backend == "torch" else None
        return Samples(sampled(c.reference, False), sampled(c.b, True), sampled(c.a, False), in_order)

    def judge_without_maxima(self, names: Sequence[str]) -> dict[str, Judgement]:
        """Returns the judgements of those gradients that pass if maxima of `b` are constants; see the caller."""
        c, given = self._c, self._given
        own = {name: name.replace("gradient:", "gradient ", 1) for name in names}
        with backends.module("torch", "tools.maxima").constant_maxima() as maxima:
            constant = c.reference.replay(given)
        size = max(rms(item.array) for name, item in self._found.items() if name.startswith(("input ", "gradient ")))
        if not maxima or any(
            rms_distance(constant[name].array, self._found[name].array) > ZERO * size for name in own.values()
        ):
            return {}
        ours = c.a.replay(given)
        judged: dict[str, Judgement] = {}
        squares = {name: np.zeros(self._found[own[name]].array.shape) for name in names}
        for number in range(SAMPLES):
            theirs = c.b.sampled_replay(given, Sample(number, True, True, True))
            nearby = c.reference.sampled_replay(given, Sample(number))
            for name, item in own.items():
                squares[name] += squared_distance(theirs[item].array, nearby[item].array)
                exact, noise = self._found[item].array, np.sqrt(squares[name] / (number + 1))
                judged[name] = judge(ours[item].array, exact, exact, sampled_noise=noise)
            worst = max(judgement.ratio for judgement in judged.values())
            if worst > LIMITS.get(number + 1, math.inf) or worst <= sure_limit(number + 1):
                break
        return {name: judgement for name, judgement in judged.items() if judgement.passed}


def _bias_noise(given: Replay, name: str) -> Array | None:
    """Returns the noise of the gradient of a bias if it is summed term by term; None for anything else.

    It is the sum of the cotangents, so no replay is needed.
    """
    pair, seeds = given.pair, given.cotangents
    kind = pair.kind or ""
    is_sum = kind.startswith(("linear", "conv")) or kind in ("layer_norm", "group_norm", "batch_norm")
    if name != "gradient:bias" or seeds is None or not is_sum or not pair.is_leaf:
        return None
    axis = 1 if align.KINDS.get(kind) == align.MOVED else -1
    terms = np.moveaxis(seeds[0].array, axis, -1)
    terms = np.ascontiguousarray(terms, np.float32).reshape(-1, terms.shape[-1])
    exact = terms.sum(axis=0, dtype=np.float64)
    squares = np.zeros(exact.shape)
    for index in range(FEW):
        start = len(terms) * index // FEW
        squares += np.square(np.add.accumulate(np.roll(terms, start, axis=0), axis=0)[-1] - exact)
    noise: Array = np.sqrt(squares / FEW)
    return noise


def _are_same(x: Sequence[Value] | None, y: Sequence[Value] | None) -> bool:
    """Returns whether two lists hold the same objects, or both are None."""
    if x is None or y is None:
        return x is y
    return len(x) == len(y) and all(map(operator.is_, x, y))


def _is_same(found: Mapping[str, Value], recorded: list[Value]) -> bool:
    """Returns whether a replay of the reference computes what its run did, but for the rounding of its inputs."""
    for index, item in enumerate(map(as_floats, recorded)):
        other = found[f"output[{index}]" if index else "output"]
        if other.array.shape != item.array.shape:
            return False
        if not item.is_float or item.array.size == 0:
            continue
        x, y = other.array, item.array
        distance, size = rms_distance(x, y), rms(y)
        if not math.isfinite(distance):
            finite = np.isfinite(x) & np.isfinite(y)
            if not np.array_equal(np.isfinite(x), np.isfinite(y)):
                return False
            distance, size = rms_distance(x[finite], y[finite]), rms(y[finite])
        if distance > _SAME * size:
            return False
    return True
