"""The stage `forward`: the modes of the modules, and the outputs of each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy.typing as npt

from icenet.parity import align
from icenet.parity.calls import culprit
from icenet.parity.calls.culprit import Origin
from icenet.parity.calls.pairing import relative
from icenet.parity.calls.pairs import FRAMEWORK_LAYERS, Pair, as_floats, hidden
from icenet.parity.calls.replays import replay
from icenet.parity.calls.runs import agrees_in_samples
from icenet.parity.calls.structures import numbers
from icenet.parity.causes.passed import find_passed, passes_on
from icenet.parity.results import status as states
from icenet.parity.results.result import Row, Stage
from icenet.parity.results.rows import histogram, is_in, neutral
from icenet.parity.state import Comparison
from icenet.parity.trace import Value
from icenet.parity.yardstick import FACTOR, Judgement, judge

Array = npt.NDArray[Any]


_EQUAL = 1e-6
"""Largest relative distance of equal Python numbers; one may be that of an fp32 array."""
_NUMBER, _ROUGH = 1000.0, 0.01
"""Of Python numbers with rounding: allowed multiple of the one distance that is known, and part of the number."""
_LARGE_NOISE = 0.01
"""Rounding error of an output of `b` in fp32, relative to its size, above which a note says so."""


def modes_differ(c: Comparison, stage: Stage) -> bool:
    """Compares the modes of the modules that compute something else in training mode, as the user gave them."""
    for ours, theirs in c.a.names.items():
        flags = c.a.mode(ours), c.b.mode(theirs)
        if flags[0] == flags[1] or not (c.a.depends_on_mode_at(ours) and c.b.depends_on_mode_at(theirs)):
            continue
        names = ["training" if flag else "evaluation" for flag in flags]
        note = f"it is in {names[0]} mode in a, in {names[1]} mode in b"
        stage.rows.append(Row(theirs, "mode", status=states.DIFFERS, ratio=math.inf, note=note))
    if stage.rows:
        row = stage.rows[0]
        c.report.cause = "the mode: call train() or eval() of both modules"
        c.fail(stage, row.path, note=row.note)
    return bool(stage.rows)


def outputs_agree(pairs: list[Pair], dtype: str) -> bool:
    """Returns whether the outputs of the model agree in the run."""
    root = pairs[0]
    return all(
        judge(
            align.to_torch(how, root.a.outputs[i].array),
            root.noise.outputs[j].array,
            root.b.outputs[j].array,
            dtype,
            stored=root.noise.outputs[j].dtype,
        ).passed
        for i, j, how in root.outputs
        if root.b.outputs[j].is_float
    )


def is_replayed_again(c: Comparison, pair: Pair) -> bool:
    """Returns whether a call computes the same in training mode, in which it is replayed, too.

    That is so for the frameworks' own layers without a mode. If the outputs of the model agree in evaluation mode,
    their replays in that mode find nothing more.
    """
    classes = c.a.classes.get(pair.a.path, ""), c.b.classes.get(pair.path, "")
    depends = c.a.depends_on_mode_at(pair.a.path) or c.b.depends_on_mode_at(pair.path)
    return pair.is_leaf and not depends and all(name.startswith(FRAMEWORK_LAYERS) for name in classes)


def judge_forward(
    c: Comparison, stage: Stage, pairs: list[Pair], found: dict[int, dict[str, Judgement]], note: str
) -> None:
    """Adds a row for each output of each call, and names the call with the first difference.

    Args:
        stage, pairs: The stage and the calls.
        found: The judgements of the replays by the number of the call in `b`.
        note: Remark on the mode, for all rows.
    """
    apart = [inner for pair in pairs for inner in pair.apart]
    candidates = ((pair, culprit.first_output(pair, found.get(pair.b.number, {}))) for pair in (*pairs, *apart))
    origins = sorted(
        ((pair, origin) for pair, origin in candidates if origin is not None), key=lambda item: item[1].order
    )
    passed = ""
    if origins:
        _move_into(c, origins, found)
        passed = _move_to_caller(c, pairs, origins, found)
    differing = {pair.path for pair, _ in origins}
    first = origins[0][1].order if origins else math.inf
    places = {id(pair): origin for pair, origin in origins}
    _note_noise(c, pairs, found)
    for pair in pairs:
        own = {n: j for n, j in found.get(pair.b.number, {}).items() if n.startswith(("output", "statistic"))}
        worst = max(own.values(), key=lambda judgement: judgement.ratio, default=None)
        if passed and pair is origins[0][0]:
            worst = origins[0][1].judgement
        for i, j, how in pair.outputs:
            if as_floats(pair.b.outputs[j]).is_float:
                stage.rows.append(_output_row(c, pair, (i, j, how), worst, places, differing, first, note))
        if pair.obstacle and pair.obstacle not in c.notes_of(pair.path):
            c.notes_of(pair.path).append(pair.obstacle)
    stage.rows += [apart_row(inner, places[id(inner)]) for inner in apart if id(inner) in places]
    if origins:
        pair, origin = origins[0]
        c.fail(stage, pair.path, origin.where, neutral(origin.judgement.note) or note)
        if passed:
            c.report.cause = passed
        else:
            c.suggest(pair, found[pair.b.number])
        return
    if _updates_differ(c, stage, pairs, found) or _numbers_differ(c, stage, pairs[0]):
        return
    # every module agrees on equal inputs; the run as a whole may be off only by what the modules are
    root = [row for row in stage.rows if row.path == "" and row.part.startswith("output")]
    for row in root:
        if row.ratio > FACTOR * c.factor and not row.note and not agrees_in_samples(c, pairs, row):
            index = stage.rows.index(row)
            stage.rows[index] = replace(row, status=states.DIFFERS)
            c.fail(stage, "", "", "the run differs, although every module agrees on the inputs of the reference")


def evaluation_rows(pairs: list[Pair], found: Mapping[int, Mapping[str, Judgement]]) -> list[Row]:
    """Returns a row for each call that was replayed in evaluation mode alone, of its worst result."""
    rows = []
    for pair in pairs:
        judged = found.get(pair.b.number)
        if not judged:
            continue
        name, worst = max(judged.items(), key=lambda item: item[1].ratio)
        status = states.DIFFERS if not worst.passed else states.LESS_EXACT if worst.plain_ratio else states.PASSED
        shape, number = pair.b.outputs[0].array.shape, pair.b.number
        row = Row(pair.path, name, shape, status, worst.ratio, worst.error, worst.noise, worst.scale, worst.ratio)
        note = neutral("; ".join(filter(None, ("in evaluation mode", worst.note))))
        rows.append(replace(row, own_part=name, note=note, call=pair.b.call, depth=number))
    return rows


def _updates_differ(
    c: Comparison, stage: Stage, pairs: list[Pair], found: Mapping[int, Mapping[str, Judgement]]
) -> bool:
    """Compares how often modules are called that update running statistics in each call."""
    counts = [Counter(event.path for event in root.walk()) for root in (pairs[0].a, pairs[0].b)]
    for pair in pairs:
        ours, theirs = counts[0][pair.a.path], counts[1][pair.path]
        is_same = ours == theirs and pair.a.call == pair.b.call
        if not is_same and any(name.startswith("statistic ") for name in found.get(pair.b.number, {})):
            times = [f"{count} times" if count > 1 else "once" for count in (ours, theirs)]
            what = f"called {times[0]} in a, {times[1]} in b" if ours != theirs else "called in another order in a"
            note = f"it is {what}, and each call updates its running statistics"
            stage.rows.append(Row(pair.path, "statistics", status=states.DIFFERS, ratio=math.inf, note=note))
            c.fail(stage, pair.path, note=note)
            return True
    return False


def _numbers_differ(c: Comparison, stage: Stage, root: Pair) -> bool:
    """Compares the Python numbers that the models return; those that are computed with rounding, roughly."""
    ours, theirs, exact = (numbers(event.result) for event in (root.a, root.noise, root.b))
    for name in sorted(ours.keys() & theirs.keys() & exact.keys()):
        own, noisy = ours[name], theirs[name]
        noise = 0.0 if noisy == exact[name] else _NUMBER * abs(noisy - exact[name]) + _ROUGH * abs(noisy)
        if not math.isfinite(noise) or math.isclose(own, noisy, rel_tol=_EQUAL, abs_tol=noise):
            continue
        note = f"output{name} is the number {ours[name]} in a, {theirs[name]} in b"
        stage.rows.append(Row("", f"output{name}", status=states.DIFFERS, ratio=math.inf, note=note))
        c.fail(stage, "", note=note)
        return True
    return False


def _note_noise(c: Comparison, pairs: list[Pair], found: Mapping[int, Mapping[str, Judgement]]) -> None:
    """Adds a note on modules of `b` whose rounding errors are so large that mistakes in `a` may be smaller."""
    for pair in pairs:
        judged = found.get(pair.b.number, {}) if c.dtype == "fp32" else {}
        share = max((j.noise / j.scale for n, j in judged.items() if n.startswith("output") and j.scale), default=0.0)
        if share > _LARGE_NOISE:
            what = f"b in fp32 is off from float64 by {share:.2g} of its size, so smaller mistakes of a are not found"
            why = "its results depend on rounding, or it rounds float64 itself"
            c.add_notes([f"{pair.path or 'the model'}: {what} there: {why}"])


def _move_into(c: Comparison, origins: list[tuple[Pair, Origin]], found: dict[int, dict[str, Judgement]]) -> None:
    """Replaces the first origin by a call within it that gets other rows on each side, if it differs on equal ones.

    A recorded reference cannot compute such a call alone.
    """
    pair, _ = origins[0]
    for inner in pair.apart if c.computes_reference else ():
        found[inner.b.number] = replay(c, inner, gradients=False)
        own = culprit.first_output(inner, found[inner.b.number])
        if own is not None and own.judgement.is_over and own.order <= origins[0][1].order:
            origins[0] = inner, own


def apart_row(pair: Pair, origin: Origin) -> Row:
    """Returns the row of a call that gets other rows on each side: of its replay, as its runs cannot be compared."""
    found = origin.judgement
    return Row(
        pair.path,
        "gradient of output" if origin.name.startswith(("input ", "gradient:")) else pair.b.output_label(0),
        pair.b.outputs[0].array.shape,
        states.DIFFERS,
        found.ratio,
        found.error,
        found.noise,
        found.scale,
        found.ratio,
        origin.label,
        origin.where,
        neutral(found.note),
        pair.b.call,
        pair.b.number,
    )


def _move_to_caller(
    c: Comparison, pairs: list[Pair], origins: list[tuple[Pair, Origin]], found: Mapping[int, Mapping[str, Judgement]]
) -> str:
    """Replaces the first origin by its caller, if that passes other arguments to it; returns which, else empty."""
    pair, origin = origins[0]
    outer = _caller(pairs, pair)
    if outer is None:
        return ""
    passed = find_passed(c, pair, outer, found[pair.b.number])
    if passed:
        c.suggest(pair, found[pair.b.number])
        passed += f": {c.report.cause}" if "mask" in c.report.cause and "mask" in passed else ""
        child = relative(pair.path, outer.path)
        while passes_on(c, outer, pair) and (upper := _caller(pairs, outer)) is not None:
            pair, outer = outer, upper
        passed = passed.replace(f"{child} gets", f"{relative(pair.path, outer.path)} gets")
        label = f"output of {relative(pair.path, outer.path)}"
        where = culprit.between(outer, pair)
        origins[0] = outer, origin._replace(order=pair.b.number - 0.5, where=where, label=label)
    return passed


def _caller(pairs: list[Pair], pair: Pair) -> Pair | None:
    return next((other for other in pairs if any(child is pair for child in other.children)), None)


def _output_row(
    c: Comparison,
    pair: Pair,
    arrays: tuple[int, int, str],
    worst: Judgement | None,
    places: Mapping[int, Origin],
    differing: set[str],
    first: float,
    note: str,
) -> Row:
    i, j, how = arrays
    ours = as_floats(Value(align.to_torch(how, pair.a.outputs[i].array), pair.a.outputs[i].dtype)).array
    theirs, exact = as_floats(pair.noise.outputs[j]), as_floats(pair.b.outputs[j])
    if j in pair.masked_outputs:
        ours, theirs, exact = hidden(Value(ours, theirs.dtype)).array, hidden(theirs), hidden(exact)
    judged = judge(ours, theirs.array, exact.array, c.dtype, stored=theirs.dtype)
    is_over = not judged.passed
    status, where, part = states.PASSED, "", pair.b.output_label(j)
    if id(pair) in places:
        status, where, own_part = states.DIFFERS, places[id(pair)].where, places[id(pair)].label
    elif any(path != pair.path and is_in(path, pair.path) for path in differing):
        status, own_part = states.CONTAINS, ""
    elif is_over and pair.b.number > first:
        status, own_part = states.INHERITS, ""
    else:
        own_part = ""
        if is_over or (worst is not None and worst.plain_ratio):
            status = states.LESS_EXACT
    remarks = filter(None, (note, judged.note, worst.note if worst is not None else "", pair.obstacle))
    ratio = judged.ratio if worst is None else max(judged.ratio, worst.ratio)
    return Row(
        pair.path,
        part,
        exact.array.shape,
        status,
        ratio,
        judged.error,
        judged.noise,
        judged.scale,
        worst.ratio if worst is not None else None,
        own_part,
        where,
        neutral("; ".join(dict.fromkeys(remarks))),
        pair.b.call,
        pair.b.number,
        histogram(ours, exact.array) if status == states.DIFFERS else None,
    )
