"""Causes in what a module passes to one that it calls: an argument of one side only, another number, another mask.

The call then differs in its replay, because each side keeps such an argument, but the difference begins in the code
of the caller.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from icenet.parity import align
from icenet.parity.calls.events import Event
from icenet.parity.calls.pairing import relative
from icenet.parity.calls.pairs import Pair
from icenet.parity.calls.replays import replay
from icenet.parity.calls.sides import Side
from icenet.parity.causes.trial import Trial
from icenet.parity.state import Comparison
from icenet.parity.trace import Value
from icenet.parity.yardstick import Judgement

Array = npt.NDArray[Any]


def find_passed(c: Comparison, pair: Pair, outer: Pair, judgements: Mapping[str, Judgement]) -> str:
    """Returns what the caller of a call that differs passes to it on one side only; empty if that is not why.

    Args:
        c: The comparison.
        pair: The call.
        outer: The call around it.
        judgements: Those of its replay.
    """
    if all(judgement.passed for name, judgement in judgements.items() if name.startswith("output")):
        return ""
    child = relative(pair.path, outer.path)
    for j in _other_masks(pair):
        return f"the mask that {child} gets as {argument_name(c.b, pair.b, j)} hides other elements in a than in b"
    if text := _other_ids(c, pair):
        return f"{child} gets {text}"
    only, numbers_apart = _one_sided(pair), _unequal_numbers(c, pair)
    with contextlib.suppress(align.ReplayError, KeyError):
        trial = Trial(c, pair, judgements)
        ours = trial.ours
        for side, own, event in (("b", c.reference, pair.b), ("a", c.a, pair.a)):
            numbers = only.get(side, []) if side == "a" or c.computes_reference else []
            for left_out in (*({n} for n in numbers), *([set(numbers)] if len(numbers) > 1 else [])):
                without = _replayed_without(trial, own, event, frozenset(left_out))
                if not without:
                    continue
                trial.ours = {**ours, **without} if side == "a" else ours
                if trial.explains(trial.exact if side == "a" else without):
                    return f"{child} gets the argument {argument_name(own, event, min(left_out))} in {side} only"
            trial.ours = ours
        for name, number in numbers_apart.items() if c.computes_reference else ():
            with _passed(pair.b, number.place, number.ours):
                if trial.explains(trial.replay()):
                    return f"{child} gets {name} = {number.ours!r} in a, {number.theirs!r} in b"
    return ""


def _replayed_without(trial: Trial, side: Side, event: Event, numbers: frozenset[int]) -> dict[str, Value]:
    """Returns what a side computes without some arguments, or with zeros in their place; empty if it fails."""
    try:
        return trial.named(side.replay(replace(trial.given, left_out=numbers)))
    except align.ReplayError:  # it needs the argument, as a bias that is added
        before = list(event.arguments)
        try:
            for n in numbers:
                event.arguments[n] = replace(before[n], array=np.zeros_like(before[n].array))
            return trial.named(side.replay(trial.given))
        except align.ReplayError:
            return {}
        finally:
            event.arguments[:] = before


def passes_on(c: Comparison, outer: Pair, pair: Pair) -> bool:
    """Returns whether a call only passes on what `find_passed` found: it gets it itself."""
    if _other_masks(pair):
        return bool(_other_masks(outer))
    if _ids_apart(pair):
        return bool(_ids_apart(outer))
    values = {(n.ours, n.theirs) for n in _unequal_numbers(c, pair).values()}
    if values & {(n.ours, n.theirs) for n in _unequal_numbers(c, outer).values()}:
        return True
    for side, numbers in _one_sided(pair).items():
        events = (outer.a, pair.a) if side == "a" else (outer.b, pair.b)
        given = [events[0].arguments[n].array for n in _one_sided(outer).get(side, [])]
        if any(np.array_equal(events[1].arguments[n].array, array) for n in numbers for array in given):
            return True
    return False


def _other_masks(pair: Pair) -> list[int]:
    """Returns the numbers in `b` of the masks that hide other elements on each side."""
    found = []
    for j in sorted(pair.own):
        name = pair.b.names[j]
        ours = pair.a.arguments[pair.a.names.index(name) if name in pair.a.names else j]
        if hides_otherwise(ours.array, pair.b.arguments[j].array):
            found.append(j)
    return found


def _other_ids(c: Comparison, pair: Pair) -> str:
    """Returns which ids the call gets more or fewer of in `a`, if it agrees on those of `b`; empty if none."""
    places = _ids_apart(pair)
    if not places or not c.computes_reference:
        return ""
    given = [*pair.arguments, *((i, j, align.SAME) for i, j in places)]
    equal = replace(pair, arguments=sorted(given, key=lambda place: place[1]))
    with contextlib.suppress(align.ReplayError):
        if all(judgement.passed for judgement in replay(c, equal, gradients=False).values()):
            i, j = places[0]
            shapes = [list(event.arguments[n].array.shape) for event, n in ((pair.a, i), (pair.b, j))]
            return f"the argument {argument_name(c.b, pair.b, j)} of shape {shapes[0]} in a, {shapes[1]} in b"
    return ""


def _ids_apart(pair: Pair) -> list[tuple[int, int]]:
    """Returns the numbers in `a` and `b` of the arguments that are integers, and more of them on one side."""
    found = []
    for j, name in enumerate(pair.b.names):
        i = pair.a.names.index(name) if name in pair.a.names else j
        if i < len(pair.a.arguments) and all(place[1] != j for place in pair.arguments):
            ours, theirs = pair.a.arguments[i].array, pair.b.arguments[j].array
            if ours.dtype.kind == theirs.dtype.kind == "i" and ours.ndim == theirs.ndim and ours.size != theirs.size:
                found.append((i, j))
    return found


def _one_sided(pair: Pair) -> dict[str, list[int]]:
    """Returns the numbers of the arguments that only one side has, if it has more of them."""
    if len(pair.a.arguments) == len(pair.b.arguments):
        return {}
    given = {side: {place[index] for place in pair.arguments} for index, side in enumerate("ab")}
    return {
        side: [n for n in range(len(event.arguments)) if n not in given[side]]
        for side, event in (("a", pair.a), ("b", pair.b))
    }


class _Number(NamedTuple):
    """A number, flag or text that a call gets, with another value on each side, and its place in `b`."""

    place: int | str
    ours: Any
    theirs: Any


def _unequal_numbers(c: Comparison, pair: Pair) -> dict[str, _Number]:
    """Returns the numbers, flags and texts of a call that are others on each side, by the name of the argument.

    Arguments correspond by name, or by position if the modules name them otherwise.
    """
    ours, theirs = (
        {(place, _parameter(side, event, place)): item for place, item in _plain(event)}
        for side, event in ((c.a, pair.a), (c.b, pair.b))
    )
    found: dict[str, _Number] = {}
    for (place, name), value in theirs.items():
        own = [item for key, item in ours.items() if key[1] == name] or [
            item for key, item in ours.items() if key[0] == place and isinstance(place, int)
        ]
        if own and type(own[0]) is type(value) and own[0] != value:
            found[name] = _Number(place, own[0], value)
    return found


def _plain(event: Event) -> list[tuple[int | str, Any]]:
    """Returns the numbers, flags and texts among the arguments of a call, by position or keyword."""
    args, kwargs = event.given or ((), {})  # a trace has the arrays alone
    items: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return [(place, item) for place, item in items if isinstance(item, (bool, int, float, str))]


@contextlib.contextmanager
def _passed(event: Event, place: int | str, value: Any) -> Iterator[None]:
    """Passes another number in a call while the context is open."""
    before = event.given
    args, kwargs = before
    if isinstance(place, int):
        event.given = (*args[:place], value, *args[place + 1 :]), kwargs
    else:
        event.given = args, {**kwargs, place: value}
    try:
        yield
    finally:
        event.given = before


def hides_otherwise(ours: Array, theirs: Array) -> bool:
    """Returns whether two masks of any form hide other elements; booleans may be true for those, or for the rest."""
    shapes = [tuple(size for size in array.shape if size > 1) for array in (ours, theirs)]
    if shapes[0] != shapes[1]:
        return False  # one of them may be repeated
    hidden = [_hidden(array).reshape(-1) for array in (ours, theirs)]
    either = [array.dtype.kind != "f" or align.masked(array) is None for array in (ours, theirs)]
    same = np.array_equal(hidden[0], hidden[1])
    return not same and not (any(either) and np.array_equal(hidden[0], ~hidden[1]))


def _hidden(array: Array) -> Array:
    found = align.masked(array) if array.dtype.kind == "f" else None
    return found if found is not None else array == 0


def argument_name(side: Side, event: Event, index: int) -> str:
    """Returns the name of an array among the arguments of a call."""
    name = event.names[index].partition("[")[0]
    return _parameter(side, event, int(name) if name.isdigit() else name)


def _parameter(side: Side, event: Event, place: int | str) -> str:
    """Returns the name of an argument of a call, given its position or its keyword."""
    module = getattr(side, "modules", {}).get(event.path)
    if isinstance(place, int) and module is not None:
        with contextlib.suppress(TypeError, ValueError):
            parameters = inspect.signature(module.forward if hasattr(module, "forward") else module).parameters
            named = [name for name, item in parameters.items() if item.kind is not item.VAR_POSITIONAL]
            if place < len(named):
                return named[place]
    return str(place)
