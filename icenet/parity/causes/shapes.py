"""Causes of outputs whose shapes differ, in the code of a module."""

from __future__ import annotations

import contextlib

from icenet.core import backends
from icenet.parity import align
from icenet.parity.calls.events import Run
from icenet.parity.calls.pairing import Mismatch, first_mismatch, pair_calls
from icenet.parity.calls.sides import ModuleError
from icenet.parity.state import Comparison


def find_shapes(c: Comparison, runs: tuple[Run, Run, Run], mismatch: Mismatch) -> str:
    """Returns the operation of `b` without which the shapes agree there; empty if none is known.

    Args:
        c, runs: The comparison, and its runs: of `a`, of `b` and of the reference.
        mismatch: The first array whose shapes differ.
    """
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
