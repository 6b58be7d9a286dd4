"""The first array of two runs whose shape differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from icenet.parity.calls.events import Event
from icenet.parity.calls.pairing import argument_mismatch, nearest, output_mismatch, relative, unequal
from icenet.parity.calls.pairs import Pair


@dataclass(frozen=True)
class Mismatch:
    """The first array whose shape differs.

    Attributes:
        path: Path in `b` of the module that computed it.
        where: Where in that module, between which of its calls.
        note: The shapes.
        child: Path in `b` of the module that gets it; empty for an output.
        order: Position in the order of the computation.
    """

    path: str
    where: str
    note: str
    child: str = ""
    order: float = 0.0


def first_mismatch(pairs: list[Pair]) -> Mismatch | None:
    """Returns the first array in the order of the computation that differs in shape between the sides."""
    by_event = {id(pair.b): pair for pair in pairs}

    def visit(event: Event, parent: Event | None, before: str) -> Mismatch | None:
        pair = by_event.get(id(event))
        if pair is not None:
            note = argument_mismatch(pair)
            if note:
                name = relative(event.path, parent.path) if parent is not None else ""
                where = f"{f'between {before} and' if before else 'before'} {name}" if parent is not None else ""
                path = parent.path if parent is not None else ""
                return Mismatch(path, where, note, event.path, event.number - 0.5)
        last = ""
        for child in event.children:
            found = visit(child, event if pair is not None else parent, last if pair is not None else before)
            if found is not None:
                return found
            last = relative(child.path, event.path) if id(child) in by_event else last
        if pair is not None and (note := output_mismatch(pair)):
            if mismatch := _other_ids(pair, by_event):
                return mismatch
            order = max(inner.number for inner in event.walk()) + 0.5
            return Mismatch(event.path, f"after {last}" if last else "", note, order=order)
        return None

    root = next(iter(pairs), None)
    return None if root is None else visit(root.b, None, "")


def _other_ids(pair: Pair, by_event: Mapping[int, Pair]) -> Mismatch | None:
    """Returns the mismatch of the outermost call that passes ids of another shape on to a call; None without one."""
    found = None
    while note := _ids_mismatch(pair):
        outer = pair.b.parent
        while outer is not None and id(outer) not in by_event:
            outer = outer.parent
        if outer is None:
            break
        name = relative(pair.path, outer.path)
        before = [child for child in nearest(outer, by_event) if child.number < pair.b.number]
        where = f"between {relative(before[-1].path, outer.path)} and {name}" if before else f"before {name}"
        found = Mismatch(outer.path, where, note, pair.path, pair.b.number - 0.5)
        pair = by_event[id(outer)]
    return found


def _ids_mismatch(pair: Pair) -> str:
    """Returns a phrase on integers of another shape among the arguments; empty if there are none."""
    for ours, theirs in zip(pair.a.arguments, pair.b.arguments, strict=False):
        are_ids = "i" == ours.array.dtype.kind == theirs.array.dtype.kind and ours.array.ndim == theirs.array.ndim
        if are_ids and ours.array.size != theirs.array.size:
            return unequal(None, ours, theirs, "input of")
    return ""
