"""Causes of outputs whose shapes differ, in the code of a module."""

from __future__ import annotations

import contextlib

from icenet.core import backends
from icenet.parity import align
from icenet.parity.calls.events import Run
from icenet.parity.calls.mismatches import Mismatch, first_mismatch
from icenet.parity.calls.pairing import pair_calls, relative
from icenet.parity.calls.sides import ModuleError
from icenet.parity.state import Comparison


def find_shapes(c: Comparison, runs: tuple[Run, Run, Run], mismatch: Mismatch) -> str:
    """Returns the operation of `b` without which the shapes agree there; empty if none is known.

    Args:
        c, runs: The comparison, and its runs: of `a`, of `b` and of the reference.
        mismatch: The first array whose shapes differ.
    """
    if text := _gets_another(c, runs, mismatch) or _called_before(c, runs, mismatch):
        return text
    if c.reference.backend != "torch" or not c.computes_reference:
        return ""
    variants = backends.module("torch", "tools.variants")
    inputs = c.inputs_a
    with variants.spying() as calls:
        c.reference_run(inputs)
    called = {call.name for call in calls}
    for variant in variants.SHAPES:
        if called & variant.names:
            # without the operation, a later one may fail
            with contextlib.suppress(ModuleError, align.ReplayError), variants.applied(variant):
                exact = c.reference_run(inputs)
                noise = c.b.record(inputs.given, c.inputs_b, c.store)
                found = first_mismatch(pair_calls(c.a, c.b, (runs[0], noise, exact), c.matches)[0])
                if found is None or found.order > mismatch.order:
                    return str(variant.text)
    return ""


def _gets_another(c: Comparison, runs: tuple[Run, Run, Run], mismatch: Mismatch) -> str:
    """Returns which other call of `b` gets what a call of `a` gets, such as the tokens of another expert."""
    if not mismatch.child:
        return ""
    pairs = pair_calls(c.a, c.b, runs, c.matches)[0]
    pair = next((pair for pair in pairs if pair.path == mismatch.child), None)
    for other in pairs:
        is_sibling = (
            pair is not None and other.path not in ("", pair.path) and _holder(other.path) == _holder(pair.path)
        )
        if pair is None or not is_sibling or not pair.a.arguments or not other.b.arguments:
            continue
        ours, theirs = pair.a.arguments[0].array, other.b.arguments[0].array
        how = align.alignment(other.kind, ours, theirs, {}) or align.exchanged(ours, theirs)
        if how is not None and ours.dtype.kind == "f" and align.is_near(align.to_torch(how, ours), theirs):
            names = [relative(path, mismatch.path) for path in (pair.path, other.path)]
            return f"{names[0]} gets in a what {names[1]} gets in b"
    return ""


def _called_before(c: Comparison, runs: tuple[Run, Run, Run], mismatch: Mismatch) -> str:
    """Returns which module is called before the one that gets other shapes on one side, and after it on the other."""
    if not mismatch.child:
        return ""
    orders: list[list[str]] = []
    for run, own in ((runs[0], c.a.names), (runs[2], None)):
        paths = [event.path if own is None else own.get(event.path, "") for event in run.events]
        siblings = [path for path in paths if path and _holder(path) == _holder(mismatch.child)]
        orders.append([path for path in siblings if siblings.count(path) == 1])
    if any(mismatch.child not in order for order in orders):
        return ""
    before = [order[: order.index(mismatch.child)] for order in orders]
    for side, other in ((0, 1), (1, 0)):
        for path in before[side]:
            if path in orders[other] and path not in before[other]:
                names = [relative(name, mismatch.path) for name in (path, mismatch.child)]
                places = ("before", "after") if side == 0 else ("after", "before")
                return f"{names[0]} is called {places[0]} {names[1]} in a, {places[1]} it in b"
    return ""


def _holder(path: str) -> str:
    return path.rpartition(".")[0]
