"""Replays on larger inputs than those of the run: they reach bounds that the run does not.

A ReLU6 and a ReLU are equal while no value is above 6, and leaky ReLUs of any slope while none is below 0. So the
code of users and the layers without parameters are replayed once more, forward only, on random values of both signs.
Code with a softmax is left out: masks of -1e4 and -inf, and the maxima of rows and of all scores, are equal only for
scores of a usual size. Unit vectors and probabilities stay as they are: 2 - 2 x.y is the squared distance of unit
vectors only. Running statistics that a user's class uses are replaced in the same way.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.core.weights import layout
from icenet.parity import align
from icenet.parity.calls.own_code import code_of
from icenet.parity.calls.pairs import FRAMEWORK_LAYERS, Pair
from icenet.parity.calls.replays import judge_replay, replay
from icenet.parity.measures import rms
from icenet.parity.nearby import Perturbation
from icenet.parity.state import Comparison
from icenet.parity.trace import Value
from icenet.parity.yardstick import FACTOR, Judgement

LARGEST = 48.0
"""Bound of the values. Exponentials of them do not overflow in fp32."""
_SAMPLES = 4
"""Number of problems that decide whether an error is that of a bound."""
_SMALL = 1 << 14
"""Number of values above which independent ones reach each part of the range."""
_UNIT = 1e-2
"""Largest distance from 1 of the squared norm of unit vectors, or of the sum of probabilities, in half precision."""
_REMARK = f"at inputs of up to {LARGEST:g}, which reach bounds that those of the run do not"
_SOFTMAX = {"softmax", "log_softmax", "scaled_dot_product_attention"}
_QUOTIENTS = {"div", "truediv", "rdiv", "rtruediv", "itruediv", "reciprocal", "log"}
"""With them and sums of exponentials, code may make a softmax or its logarithm."""
_SUMS = {"sum", "max", "amax", "scatter_add", "index_add", "scatter_reduce"}


def replay_larger(c: Comparison, pairs: list[Pair]) -> dict[int, dict[str, Judgement]]:
    """Returns the judgements that are over the tolerance on larger inputs, by the number of the event in `b`.

    The first call of each module is replayed, and of modules with equal code that of the first one. Results that are
    not finite on one side are no difference: the run shows whether its own values are. A pair that differs keeps the
    inputs, on which a cause is then searched for.
    """
    found, known = {}, set()
    for pair in (*pairs, *(inner for outer in pairs for inner in outer.apart)):
        if not c.computes_reference or pair.b.call or pair.obstacle or not _may_have_bounds(c, pair):
            continue
        if (code := code_of(c, pair)) in known:
            continue
        known |= {code} - {None}
        over, is_known = _judge_at(c, pair, "any")
        if not is_known:  # the function is not defined for other signs
            over, is_known = _judge_at(c, pair, "run")
        if is_known and not over and c.dtype != "fp32":  # the rounding of positive results hides small slopes
            over, _ = _judge_at(c, pair, "negative")
        if over:
            found[pair.b.number] = over
    return found


def replay_statistics(c: Comparison, pairs: list[Pair]) -> dict[int, dict[str, Judgement]]:
    """Returns the judgements that are over the tolerance with other running statistics, by the number of the event.

    Those of a new model are 0 and 1, so that evaluation mode does not show whether a user's class uses them.
    """
    found = {}
    back = {theirs: ours for ours, theirs in c.parameter_names.items()}
    for pair in pairs if c.computes_reference else ():
        names = c.a.classes.get(pair.a.path, ""), c.b.classes.get(pair.path, "")
        if pair.b.call or pair.obstacle or pair.children or all(name.startswith(FRAMEWORK_LAYERS) for name in names):
            continue
        paths = [path for path in c.b.own_names(pair.path) if path in back and path not in c.b.trainable_names]
        if not any(layout.split(path)[1] in layout.STATISTICS for path in paths):
            continue
        key = zlib.crc32(f"{c.seed} statistics {pair.key}".encode())
        generator = np.random.Generator(np.random.SFC64(key))
        values = {path: generator.uniform(0.5, 2.0, c.b.shapes[path]).astype(np.float32) for path in paths}
        with contextlib.ExitStack() as stack:
            for side in (c.a, c.b, c.reference):
                own = {back[path] if side is c.a else path: array for path, array in values.items()}
                stack.enter_context(side.tools.assigned(side.module, own))
            judged = replay(c, pair, gradients=False)
        if over := {n: replace(j, note="with other running statistics") for n, j in judged.items() if j.is_over}:
            found[pair.b.number] = over
    return found


def _judge_at(c: Comparison, pair: Pair, signs: str) -> tuple[dict[str, Judgement], bool]:
    """Returns the judgements over the tolerance on inputs of some signs, and whether all were decided."""
    pair.larger = _larger(c, pair, signs)
    judged = _judge(c, pair)
    over = {name: replace(item, note=_REMARK) for name, item in judged.items() if item.is_over}
    if over and _is_steady(c, pair, list(over)):
        return over, True
    pair.larger = None
    return {}, bool(over) or all(item.passed for item in judged.values())


def _judge(c: Comparison, pair: Pair) -> Mapping[str, Judgement]:
    given = c.replay_of(pair, False)
    try:
        if c.reference.backend != "torch":
            return judge_replay(c, given, c.reference.replay(given))[0]
        with backends.module("torch", "tools.variants").spying() as calls:
            exact = c.reference.replay(given)
        names = {call.name for call in calls}
        has_softmax = names & _SOFTMAX or ("exp" in names and names & _SUMS and names & _QUOTIENTS)
        return {} if has_softmax else judge_replay(c, given, exact)[0]
    except align.ReplayError:  # `b` does not take such inputs
        return {}


def _is_steady(c: Comparison, pair: Pair, names: list[str]) -> bool:
    """Returns whether errors are about the same, and above the noise, if the inputs are moved by ulps.

    Errors of a bound are. Errors of rounding change with the inputs, or are as large as those of `b` with sums term
    by term. The latter holds where large terms cancel, as in x.x + y.y - 2 x.y for a distance. The noise is pooled
    over several problems: that of a single number may be small by chance.
    """
    given, kept = c.replay_of(pair, False), pair.inputs("b")
    assert pair.larger is not None
    errors: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
    noises: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
    for sample in range(_SAMPLES):
        perturb = Perturbation(c.dtype, sample - 1)
        moved = [
            item if own is new or not sample else perturb(item, "larger", index)
            for index, (item, own, new) in enumerate(zip(given.values, kept, pair.larger, strict=True))
        ]
        at = replace(given, values=moved)
        try:
            ours, exact = c.a.replay(at), c.reference.replay(at)
            with _sums(c, sample):
                theirs = c.b.replay(at)
        except align.ReplayError:
            return True
        for name in names:
            reference = exact[name].array
            errors[name].append(ours[name].array.astype(np.float64) - reference)
            noises[name].append(theirs[name].array.astype(np.float64) - reference)
    for name in names:
        first, *others = errors[name]
        finite = np.isfinite(first)
        for array in (*others, *noises[name]):
            finite &= np.isfinite(array)
        if not finite.any():
            return True
        size, noise = (_pooled(arrays, finite) for arrays in (errors[name], noises[name]))
        if size > FACTOR * noise and rms(first[finite] - others[0][finite]) < rms(first[finite]) / 2:
            return True
    return False


def _sums(c: Comparison, sample: int) -> contextlib.AbstractContextManager[None]:
    """Returns the context in which `b` sums term by term, as MLX does."""
    if c.b.backend != "torch":
        return contextlib.nullcontext()
    found: contextlib.AbstractContextManager[None] = backends.module("torch", "tools.sums").summing_in_order(sample)
    return found


def _pooled(arrays: list[npt.NDArray[Any]], finite: npt.NDArray[np.bool_]) -> float:
    """Returns the root mean square of several arrays."""
    return rms(np.stack([array[finite] for array in arrays]))


def _may_have_bounds(c: Comparison, pair: Pair) -> bool:
    """Returns whether a call is of a user's class, or of a layer of the frameworks without parameters."""
    if any(pair.hides) or any(mask is not None for mask in pair.masks) or pair.own or pair.is_opaque:
        return False
    if not any(item.is_float for item in pair.inputs("b")):
        return False
    names = c.a.classes.get(pair.a.path, ""), c.b.classes.get(pair.path, "")
    if not all(name.startswith(FRAMEWORK_LAYERS) for name in names):
        return True
    return pair.is_leaf and pair.kind is None and not c.b.own_names(pair.path) and "Dropout" not in names[1]


def _larger(c: Comparison, pair: Pair, signs: str) -> list[Value]:
    """Returns random inputs of a replay, uniform up to LARGEST; masks, unit vectors and others as they are.

    They have any sign, those of the run, or are below -LARGEST / 2 (`signs`: "any", "run", "negative").
    A small array of n values has one in each n-th part of the range, so that it reaches bounds, too.
    """
    found = []
    for index, item in enumerate(pair.inputs("b")):
        if not item.is_float or _is_bound(item.array):
            found.append(item)
            continue
        key = zlib.crc32(f"{c.seed} larger {pair.key} {index}".encode())
        generator = np.random.Generator(np.random.SFC64(key))
        shape, size = item.array.shape, item.array.size
        places = generator.permutation(size).reshape(shape) if size <= _SMALL else None
        drawn: npt.NDArray[Any] = generator.random(shape, np.float32)
        if places is not None:
            drawn = (places + drawn) / max(size, 1)
        # nearer to 0, the terms of a GELU cancel, and a SiLU is rounded to 0 or not
        values = {"any": 2 * drawn - 1, "run": np.sign(item.array) * drawn, "negative": -(1 + drawn) / 2}[signs]
        found.append(replace(item, array=np.asarray(LARGEST * values, np.float32)))
    return found


def _is_bound(array: npt.NDArray[Any]) -> bool:
    """Returns whether code may rely on what values are: whole numbers, infinite, unit vectors or probabilities."""
    if not np.isfinite(array).all():
        return True
    # the first part of most arrays shows that they are none of these
    return _is_whole_or_unit(array[:1] if array.ndim > 1 else array) and _is_whole_or_unit(array)


def _is_whole_or_unit(array: npt.NDArray[Any]) -> bool:
    if np.array_equal(array, np.rint(array)):
        return True
    axes = {axis % array.ndim for axis in (-1, 1) if array.ndim > 1} | ({0} if array.ndim == 1 else set())
    squares = [np.square(array).sum(axis) for axis in axes if array.shape[axis] > 1]
    sums = [array.sum(axis) for axis in axes if array.shape[axis] > 1 and array.min() >= 0]
    return any(bool((np.abs(total - 1) <= _UNIT).all()) for total in (*squares, *sums))
