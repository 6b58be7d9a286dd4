"""The stages `loss` and `gradients`: the loss of equal outputs, and the backward pass of every module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.parity import align
from icenet.parity.calls import culprit
from icenet.parity.calls.events import Run
from icenet.parity.calls.pairing import relative
from icenet.parity.calls.pairs import Pair, rounded
from icenet.parity.calls.propagation import repeated
from icenet.parity.calls.replays import replay
from icenet.parity.calls.run_gradients import RunGradients
from icenet.parity.causes.calls import find_recomputed
from icenet.parity.causes.weights import find_untied
from icenet.parity.measures import blocks, rms_distance, squared_distance, sum_of_products
from icenet.parity.resampling import FEW, is_decided, median
from icenet.parity.results import status as states
from icenet.parity.results.result import Row, Stage
from icenet.parity.results.rows import index_of, is_in, neutral, split_at
from icenet.parity.stages.forward import apart_row
from icenet.parity.state import Comparison
from icenet.parity.trace import Value
from icenet.parity.yardstick import FACTOR, Judgement, judge

Array = npt.NDArray[Any]


def judge_loss(c: Comparison, stage: Stage, pairs: list[Pair], runs: tuple[Run, Run, Run]) -> None:
    """Compares the loss of the user, of equal outputs; of the default loss, the values in the run are shown."""
    if stage.status == states.SKIPPED or runs[2].loss is None:
        return
    root = pairs[0]
    values = [rounded(item, theirs.dtype) for item, theirs in zip(root.b.outputs, root.noise.outputs, strict=True)]
    c.loss_noise = _loss_noise(root)
    judged = {} if c.losses is None else _judge_users_loss(c, root, values)
    worst = max(judged.items(), key=lambda item: item[1].ratio, default=("loss", None))
    run = [float(np.asarray(run.loss.array)) if run.loss is not None else math.nan for run in runs]
    is_over = any(not item.passed for item in judged.values())
    # what overflows on both sides, float64 may hold
    is_finite = any(math.isfinite(run[0]) == math.isfinite(b) for b in (run[1:] if c.dtype == "fp32" else run[1:2]))
    status = states.DIFFERS if is_over or not is_finite else states.PASSED
    part = "loss" if worst[0] == "loss" else "gradient of the loss"
    row = Row("", "loss", (), status, error=abs(run[0] - run[2]), noise=abs(run[1] - run[2]), scale=abs(run[2]))
    if worst[1] is not None:
        row = replace(row, ratio=worst[1].ratio, own_ratio=worst[1].ratio, own_part=part)
    stage.rows.append(row)
    if status == states.DIFFERS:
        c.fail(stage, "", "in the loss", "" if is_finite else "the loss is finite on one side only")


def _judge_users_loss(c: Comparison, root: Pair, values: list[Value]) -> dict[str, Judgement]:
    """Returns the judgements of the loss of equal outputs, and of its gradient by them."""
    assert c.losses is not None
    losses = []
    hows = {j: (i, how) for i, j, how in root.outputs}
    for side, event in ((c.a, root.a), (c.b, root.noise), (c.reference, root.b)):
        given = list(values)
        if side is c.a:
            given = list(event.outputs)
            for j, (i, how) in hows.items():
                given[i] = Value(align.to_mlx(how, values[j].array), values[j].dtype)
        function = c.losses[0 if side is c.a else 1]
        losses.append(side.loss_of(event, given, function, c.targets_a if side is c.a else c.targets_b))
    ours, theirs, exact = losses
    judged = {}
    for name in exact:
        index = index_of(name)
        i, how = hows.get(index, (index, align.SAME)) if name != "loss" else (0, align.SAME)
        own = f"gradient[{i}]" if name != "loss" else name
        if own in ours and name in theirs:
            x, y = Value(align.to_torch(how, ours[own].array), ours[own].dtype), theirs[name]
            floor = 2.0**-24 * abs(float(exact["loss"].array)) if name == "loss" else 0.0
            judged[name] = judge(x.array, y.array, exact[name].array, "fp32", min_noise=floor)
    if any(not item.passed for item in judged.values()):
        judged |= _loss_in_order(c, root, values, ours, exact, judged)
    return judged


def _loss_in_order(
    c: Comparison,
    root: Pair,
    values: list[Value],
    ours: Mapping[str, Value],
    exact: Mapping[str, Value],
    judged: Mapping[str, Judgement],
) -> dict[str, Judgement]:
    """Returns the judgements of the loss with the noise of sums that are taken term by term."""
    if c.b.backend != "torch":
        return {}
    function = (c.losses or (None, None))[1]
    squares: dict[str, Array] = {}
    for index in range(FEW):
        found = c.b.loss_of(root.noise, values, function, c.targets_b, in_order=index)
        for name in judged:
            distance = squared_distance(found[name].array, exact[name].array)
            squares[name] = squares.get(name, np.zeros(distance.shape)) + distance / FEW
    again = {}
    for name, item in judged.items():
        if not item.passed and name == "loss":
            noise = np.asarray(exact[name].array) + np.sqrt(squares[name])
            again[name] = judge(ours[name].array, noise, exact[name].array, "fp32")
    return again


def judge_gradients(
    c: Comparison, stage: Stage, run: RunGradients | None, found: dict[int, dict[str, Judgement]]
) -> None:
    """Adds a row for the gradient of each output and parameter, and names the call with the first difference.

    Args:
        c, stage: The comparison and its stage.
        run: The gradients of the run; None if the stage is not wanted.
        found: The judgements of the replays by the number of the call in `b`.
    """
    if stage.status == states.SKIPPED or run is None:
        return
    judged, differing = dict(run.parameters), _differing(run.pairs, found)
    over = [name for name, item in judged.items() if item.ratio > FACTOR * c.factor]
    quick = run.judge_in_order(over) if over and not differing else {}
    # users' classes and the modules that hold these gradients are replayed already
    if over and not differing and not _are_within(quick, over):
        for pair in run.pairs:  # the errors of all modules add up
            if not pair.obstacle and pair.b.number not in run.replayed:
                found[pair.b.number] = replay(c, pair, gradients=True)
        differing = _differing(run.pairs, found)
        over = [name for name in over if judged[name].ratio > FACTOR * c.factor]
    if over and not differing:
        is_sure = _are_within(quick, over)
        judged |= {name: quick[name] for name in over} if is_sure else _judge_again(c, run, over)
        if c.ties:
            names = ", ".join(name.partition(":")[2] for name in over[:3])
            places = ", ".join(path or "the model" for path in sorted(c.ties))
            c.add_notes([f"gradients of the run are over the tolerance ({names}); possible cause: ties in {places}"])
    depth = 0
    for pair in reversed(run.pairs):  # the order of the backward pass
        if pair.outputs:
            row = _output_row(c, pair, run.outputs.get(pair.b.number), found.get(pair.b.number, {}), differing)
            stage.rows.append(replace(row, depth=depth))
            depth += 1
    for name, item in judged.items():
        stage.rows.append(replace(_parameter_row(c, run, name, item, differing), depth=len(stage.rows)))
    for pair in run.pairs:
        origin = culprit.first_gradient(pair, found.get(pair.b.number, {}))
        if origin is not None:
            for inner in reversed(pair.apart) if c.computes_reference else ():  # with equal rows
                found[inner.b.number] = replay(c, inner, gradients=True)
                own = culprit.first_gradient(inner, found[inner.b.number])
                if own is not None and own.judgement.is_over:
                    pair, origin = inner, own
                    stage.rows.append(apart_row(inner, own))
                    break
            for inner in pair.repeated:  # computed within it as well
                own = culprit.first_gradient(inner, found.get(inner.b.number, {}))
                if own is not None and own.judgement.is_over:
                    pair, origin = inner, own
                    break
            c.fail(stage, pair.path, origin.where, neutral(origin.judgement.note) or "in the backward pass")
            c.suggest(pair, found[pair.b.number])
            return
    if _cut_off(c, stage, run):
        return
    bad = [row for row in stage.rows if row.part.startswith("gradient of ") and row.status == states.DIFFERS]
    if bad:
        c.fail(stage, bad[0].path, "", bad[0].note)
        c.report.cause = c.report.cause or find_untied(c, bad[0].path) or _find_recomputed(c, run, bad[0])


def _cut_off(c: Comparison, stage: Stage, run: RunGradients) -> bool:
    """Finds parameters that `b` trains without a gradient, as under `torch.no_grad`, and that have one in `a`."""
    trained = {f"gradient:{name}" for name in c.b.parameters_within("")}  # a shared one under its first name
    names = [name for name in run.own if name in trained and name not in run.exact]
    name = next((name for name in names if np.any(run.own[name].array)), None)
    if name is None:
        return False
    path, part = split_at(name.partition(":")[2], c.b.modules)
    by_event = {id(pair.b): pair for pair in run.pairs}
    cut = next((pair for pair in run.pairs if is_in(path, pair.path) and _has_none(pair)), None)
    outer = cut.b.parent if cut is not None else None
    while outer is not None and id(outer) not in by_event:
        outer = outer.parent
    note = f"the gradient of {part} of {path or 'the model'} is none in b, and in a it is not"
    stage.rows.append(Row(path, f"gradient of {part}", status=states.DIFFERS, ratio=math.inf, note=note))
    if cut is None or outer is None:
        c.fail(stage, path, note=note)
        return True
    child = relative(cut.path, outer.path)
    c.fail(stage, outer.path, f"after {child}", note)
    c.report.cause = f"the output of {child} has no gradient in b, as under torch.no_grad: stop_gradient in MLX"
    return True


def _has_none(pair: Pair) -> bool:
    """Returns whether the first output of a call has a gradient in `a`, and none in `b`."""
    if not pair.outputs or pair.b.parent is None:
        return False
    i, j, _ = pair.outputs[0]
    own = pair.a.gradients[i]
    return pair.b.gradients[j] is None and own is not None and bool(np.any(own.array))


def _find_recomputed(c: Comparison, run: RunGradients, row: Row) -> str:
    name = f"{row.path}.{row.part.removeprefix('gradient of ')}".removeprefix(".")
    noise, exact = (values.get(f"gradient:{name}") for values in (run.noise, run.exact))
    return find_recomputed(c, name, noise, exact) if noise is not None and exact is not None else ""


def _are_within(judged: Mapping[str, Judgement], names: list[str]) -> bool:
    """Returns whether gradients are far within that noise. Most sums that all modules agree on are."""
    return all(name in judged and judged[name].ratio <= FACTOR / 2 for name in names)


def _judge_again(c: Comparison, run: RunGradients, over: list[str]) -> dict[str, Judgement]:
    """Returns the judgements of gradients of the run by the parameters, although each module agrees."""
    exact = {name: run.exact[name] for name in over}
    floors = c.propagated(exact, run.pairs)
    judged = {name: [run.judge_with(name, run.own[name].array, floors[name])] for name in floors}
    still_over = [name for name in judged if not judged[name][0].passed]
    if still_over and c.computes_reference:
        for found in repeated(c, {name: exact[name] for name in still_over}):
            for name in still_over:
                judged[name].append(run.judge_with(name, found[name], floors[name]))
            if all(is_decided(judged[name]) for name in still_over):
                break
    return {name: median(items) for name, items in judged.items()}


def _differing(pairs: list[Pair], found: Mapping[int, Mapping[str, Judgement]]) -> dict[str, str]:
    """Returns the paths of the modules whose backward pass differs in a replay, and where in them it begins."""
    differing: dict[str, str] = {}
    for pair in pairs:
        origin = culprit.first_gradient(pair, found.get(pair.b.number, {}))
        if origin is not None:
            differing.setdefault(pair.path, origin.where)
    return differing


def _output_row(
    c: Comparison,
    pair: Pair,
    judged: Judgement | None,
    found: Mapping[str, Judgement],
    differing: Mapping[str, str],
) -> Row:
    own = {name: item for name, item in found.items() if not name.startswith(("output", "statistic"))}
    worst_name = max(own, key=lambda name: own[name].ratio, default="")
    worst = own.get(worst_name)
    status = states.DIFFERS if pair.path in differing else states.PASSED
    if status == states.PASSED and worst is not None and worst.plain_ratio:
        status = states.LESS_EXACT
    note = "its gradient differs only at ties of its inputs" if pair.path in c.ties else ""
    note = note or (neutral(worst.note) if worst is not None else "")
    row = Row(pair.path, "gradient of output", pair.b.outputs[pair.outputs[0][1]].array.shape, status)
    if judged is not None:
        row = replace(row, ratio=judged.ratio, error=judged.error, noise=judged.noise, scale=judged.scale)
        if status == states.PASSED and not judged.passed:
            row = replace(row, status=states.INHERITS if differing else states.LESS_EXACT)
            if c.ties and not differing and judged.is_over:  # then the replay decides
                places = ", ".join(path or "the model" for path in sorted(c.ties))
                note = note or f"off by {states.number(judged.ratio)} in the run only, by ties of {places}"
                row = replace(row, status=states.PASSED, ratio=0.0)
    if worst is not None:
        label = culprit.gradient_label(pair, worst_name)
        row = replace(row, own_ratio=worst.ratio, own_part=label, ratio=max(row.ratio, worst.ratio))
    return replace(row, note=note, where=differing.get(pair.path, ""), call=pair.b.call)


def _parameter_row(c: Comparison, run: RunGradients, name: str, item: Judgement, differing: Mapping[str, str]) -> Row:
    path, part = split_at(name.partition(":")[2], c.b.modules)
    status = states.LESS_EXACT if item.plain_ratio else states.PASSED
    if not item.passed:
        is_over = item.ratio > FACTOR * c.factor
        status = states.INHERITS if differing else states.DIFFERS if is_over else states.LESS_EXACT
    if path in differing and not item.passed:
        status = states.DIFFERS
    exact = run.exact[name].array
    noise = rms_distance(run.noise[name].array, exact)
    part = f"gradient of {part}"
    return Row(path, part, exact.shape, status, item.ratio, item.error, noise, item.scale, note=item.note)


def _loss_noise(root: Pair) -> float:
    """Returns the noise of the loss if the errors of the outputs of `b` are independent of one another."""
    total = 0.0
    for item, theirs, gradient in zip(root.b.outputs, root.noise.outputs, root.b.gradients, strict=True):
        if gradient is None:
            continue
        for exact, noisy, weight in blocks(*(v.array.reshape(-1) for v in (item, theirs, gradient))):
            error = (noisy - exact) * weight
            total += sum_of_products(error, error) if np.isfinite(error).all() else float(np.nansum(error * error))
    return math.sqrt(total)
