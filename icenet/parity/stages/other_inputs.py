"""Runs on other values of inputs that have one value only, and so do not show what is computed of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from icenet.parity.calls import other_ids
from icenet.parity.calls.pairs import Pair
from icenet.parity.calls.runs import Draws
from icenet.parity.calls.sides import ModuleError
from icenet.parity.inputs import Inputs
from icenet.parity.results.result import Stage
from icenet.parity.stages import forward, structure
from icenet.parity.state import Comparison
from icenet.parity.variations import Variation, variations

Judge = Callable[[Comparison, Stage, list[Pair], bool], None]
"""Replays and judges the calls of runs in evaluation mode; the last argument is whether the inputs are the first."""


def compare_other_inputs(c: Comparison, given: Inputs, judge: Judge) -> None:
    """Compares the outputs in evaluation mode, with other values of all inputs with one value at once.

    If `b` does not take them, each input is varied alone. What `b` does not take is left out, with a note.

    Raises:
        StageFailed: A module differs.
    """
    if not c.wants("forward") or not c.options.get("vary", True) or not c.computes_reference:
        return
    found, without = variations(given, _tables(c, given), c.seed)
    for name in without:
        c.add_notes([f"input {name}: no other value is known to be valid, so it was not varied"])
    for number, variation in enumerate(found):
        reason = _compare(c, variation, judge)
        if not reason and number == 0:
            break
        if reason and (number or len(found) == 1):
            c.add_notes([f"input {variation.names[0]}: it was not varied, because b {reason} with other values"])
    c.set_mode(c.trains)


def _tables(c: Comparison, given: Inputs) -> dict[int, int]:
    """Returns the number of rows of the table that an input selects from, by the number of the input."""
    found: dict[int, int] = {}
    for ids, rows in c.tables:
        for index, value in enumerate(given.values):
            if other_ids.offset(value.array, ids) == 0:
                found[index] = min(rows, found.get(index, rows))
    return found


def _compare(c: Comparison, variation: Variation, judge: Judge) -> str:
    """Compares the outputs with other inputs; returns why `b` does not take them, or an empty text."""
    c.store.free()
    try:
        runs, failure = structure.evaluation_runs(c, variation.inputs)
    except ModuleError as error:
        return f"fails ({error.reason})"
    except Draws:
        return "draws other random numbers"
    if not all(np.isfinite(item.array).all() for item in runs[2].events[0].outputs if item.is_float):
        return "has values that are not finite"
    c.report.other_inputs = ", and ".join(variation.names)
    with c.stage("structure") as stage:
        pairs, _ = structure.paired(c, stage, runs, failure)
    if not forward.outputs_agree(pairs, c.dtype):
        with c.stage("forward") as stage:
            judge(c, stage, pairs, False)
    c.report.other_inputs = ""
    return ""
