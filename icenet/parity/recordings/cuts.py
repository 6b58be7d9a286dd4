"""The calls within a call that a recorded replay leaves out: those of the other side are not known yet."""

from __future__ import annotations

from collections.abc import Callable

from icenet.parity.calls.pairs import Pair
from icenet.parity.calls.sides import Side


def cuts_of(pair: Pair, pairs: list[Pair], side: Side) -> list[list[Pair]]:
    """Returns the sets of calls within a call that a replay may leave out, the finest one first.

    They are all calls one level down; those with parameters; the same with the calls within a container in its place;
    all layers with parameters at any depth; and none.
    """
    if not pair.children:
        return [[]]
    by_event = {id(item.b): item for item in pairs}
    has_weights = {item.path for item in pairs if side.parameters_within(item.path)}

    def weighted(items: list[Pair]) -> list[Pair]:
        return [item for item in items if item.path in has_weights]

    def within(items: list[Pair], is_expanded: Callable[[Pair], bool]) -> list[Pair]:
        found: list[Pair] = []
        for item in items:
            if is_expanded(item) and item.children:
                found += within(item.children, is_expanded)
            else:
                found.append(item)
        return found

    def is_container(item: Pair) -> bool:
        return side.classes[item.path].endswith((".Sequential", ".ModuleList", ".ModuleDict"))

    assert all(id(item.b) in by_event for item in pair.children)
    expanded = within(pair.children, is_container)
    candidates = [pair.children, expanded, weighted(pair.children), weighted(expanded)]
    candidates += [weighted(within(pair.children, lambda item: True)), []]
    found: list[list[Pair]] = []
    for candidate in candidates:
        if [id(item) for item in candidate] not in [[id(item) for item in other] for other in found]:
            found.append(candidate)
    return found
