"""Modules that are called several times: in another order on each side, or again with equal arguments on one side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from icenet.parity import align
from icenet.parity.calls.events import Event, Run
from icenet.parity.calls.pairs import Pair
from icenet.parity.trace import Value

_FEW = 8
"""Number of calls of a module up to which all are compared with one another."""


def calls_in_order(run_a: Run, run_b: Run, to_a: Mapping[str, str]) -> dict[tuple[str, int], Event]:
    """Returns the calls of `a` by path and by the number of the call in `b` with which they correspond.

    That is the same number, unless the arguments of more calls agree in another order.

    Args:
        run_a, run_b: The runs.
        to_a: The path in `a` of each module of `b`.
    """
    found = run_a.by_call()
    ours, theirs = _by_path(run_a), _by_path(run_b)
    for path, own in to_a.items():
        x, y = ours.get(own, []), theirs.get(path, [])
        if not x or max(len(x), len(y)) < 2:
            continue
        same = [number for number, pair in enumerate(zip(x, y, strict=False)) if _are_near(*pair)]
        if len(same) == min(len(x), len(y)):
            continue
        order: dict[int, int] = {}
        for number, event in enumerate(y):  # calls with equal arguments keep their order
            free = (k for k, other in enumerate(x) if k not in order.values() and _are_near(other, event))
            if (other := next(free, None)) is not None:
                order[number] = other
        if len(order) <= len(same):
            continue
        left = iter([k for k in range(len(x)) if k not in order.values()])
        for number in range(len(y)):
            if number not in order and (other := next(left, None)) is not None:
                order[number] = other
        for number in range(len(x)):
            del found[own, number]
        found |= {(own, number): x[k] for number, k in order.items()}
    return found


def repeated_calls(pair: Pair, by_event: Mapping[int, Pair]) -> list[Pair]:
    """Returns the children of a call that are made again, by one side or by both, with equal arguments and results.

    Either of the results may be used further, so the gradients by them are not those of the other side.
    """
    extra = {side: list(_unpaired(getattr(pair, side), by_event)) for side in ("a", "b")}
    counts = Counter(child.path for child in pair.children)

    def is_repeated(child: Pair) -> bool:
        return any(
            event.path == other.path and _are_equal(event, other)
            for event, side in ((child.a, "a"), (child.b, "b"))
            for other in extra[side]
        )

    def is_made_twice(child: Pair) -> bool:
        others = pair.children if 1 < counts[child.path] <= _FEW else ()
        return any(
            other is not child
            and other.path == child.path
            and _are_equal(child.b, other.b)
            and _are_equal(child.a, other.a)
            for other in others
        )

    return [child for child in pair.children if is_repeated(child) or is_made_twice(child)]


def _by_path(run: Run) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = {}
    for event in run.events:
        found.setdefault(event.path, []).append(event)
    return found


def _unpaired(event: Event, by_event: Mapping[int, Pair]) -> Iterator[Event]:
    """Yields the calls within an event that have no counterpart, and are in no call that has one."""
    for child in event.children:
        if id(child) not in by_event:
            yield child
            yield from _unpaired(child, by_event)


def _are_equal(x: Event, y: Event) -> bool:
    """Returns whether two calls of one side have equal arguments and results."""
    return all(
        len(ours) == len(theirs) and all(np.array_equal(p.array, q.array) for p, q in zip(ours, theirs, strict=True))
        for ours, theirs in ((x.arguments, y.arguments), (x.outputs, y.outputs))
    )


def _are_near(x: Event, y: Event) -> bool:
    """Returns whether a call of `a` and one of `b` have equal arguments but for rounding, in any axes."""
    return len(x.arguments) == len(y.arguments) and all(map(_is_near, x.arguments, y.arguments))


def _is_near(x: Value, y: Value) -> bool:
    if not (x.is_float and y.is_float):
        return x.is_float == y.is_float and np.array_equal(x.array, y.array)
    hows: list[Any] = [align.SAME, align.MOVED, align.rows(x.array, y.array)]
    return any(align.is_near(align.to_torch(how, x.array), y.array) for how in hows if how is not None)
