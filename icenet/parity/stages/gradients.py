"""The stages `loss` and `gradients`: the loss of equal outputs, and the backward pass of every module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from icenet.parity import align, culprit
from icenet.parity import status as states
from icenet.parity.culprit import Origin
from icenet.parity.events import Run
from icenet.parity.pairs import Pair, rounded
from icenet.parity.result import Row, Stage
from icenet.parity.rows import index_of, neutral, split_at
from icenet.parity.trace import Value
from icenet.parity.yardstick import (
    FACTOR,
    Judgement,
    blocks,
    judge,
    judge_values,
    rms_distance,
    squared_distance,
    sum_of_products,
)

if TYPE_CHECKING:
    from icenet.parity.comparison import Comparison

Array = npt.NDArray[Any]

_FEW = 4
"""Number of samples of the sums of a loss."""


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
    is_finite = math.isfinite(run[0]) == math.isfinite(run[2])
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
        if name in ours and name in theirs:
            x, y = ours[name], theirs[name]
            if name != "loss" and index_of(name) in hows:
                x = Value(align.to_torch(hows[index_of(name)][1], x.array), x.dtype)
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
    for index in range(_FEW):
        found = c.b.loss_of(root.noise, values, function, c.targets_b, in_order=index)
        for name in judged:
            distance = squared_distance(found[name].array, exact[name].array)
            squares[name] = squares.get(name, np.zeros(distance.shape)) + distance / _FEW
    again = {}
    for name, item in judged.items():
        if not item.passed and name == "loss":
            noise = np.asarray(exact[name].array) + np.sqrt(squares[name])
            again[name] = judge(ours[name].array, noise, exact[name].array, "fp32")
    return again


def judge_gradients(
    c: Comparison, stage: Stage, pairs: list[Pair], runs: tuple[Run, Run, Run], found: dict[int, dict[str, Judgement]]
) -> None:
    """Adds a row for the gradient of each output and parameter, and names the call with the first difference."""
    if stage.status == states.SKIPPED or not c.wants("gradients"):
        return
    depth = 0
    first: tuple[Pair, Origin] | None = None
    differing: dict[str, str] = {}
    for pair in pairs:
        origin = culprit.first_gradient(pair, found.get(pair.b.number, {}))
        if origin is not None:
            first = first or (pair, origin)
            differing.setdefault(pair.path, origin.where)
    for pair in reversed(pairs):  # the order of the backward pass
        own = {n: j for n, j in found.get(pair.b.number, {}).items() if not n.startswith(("output", "statistic"))}
        worst_name = max(own, key=lambda name: own[name].ratio, default=None)
        worst = own[worst_name] if worst_name is not None else None
        status = states.DIFFERS if pair.path in differing else states.PASSED
        if status == states.PASSED and worst is not None and worst.plain_ratio:
            status = states.LESS_EXACT
        note = "its gradient differs only at ties of its inputs" if pair.path in c.ties else ""
        note = note or (neutral(worst.note) if worst is not None else "")
        for i, j, how in pair.outputs[:1]:
            grads = pair.a.gradients[i], pair.noise.gradients[j], pair.b.gradients[j]
            row = Row(pair.path, "gradient of output", pair.b.outputs[j].array.shape, status)
            if all(g is not None for g in grads):
                ours = align.to_torch(how, grads[0].array)
                judged = judge(ours, grads[1].array, grads[2].array, c.dtype, stored=grads[1].dtype)
                scale = judged.scale
                row = replace(row, ratio=judged.ratio, error=judged.error, noise=judged.noise, scale=scale)
                if status == states.PASSED and not judged.passed:
                    row = replace(row, status=states.INHERITS if differing else states.LESS_EXACT)
                    if c.ties and not differing:
                        note = note or f"in the run only, as gradients differ at ties of {', '.join(sorted(c.ties))}"
            if worst is not None:
                label = culprit.gradient_label(pair, worst_name or "")
                row = replace(row, own_ratio=worst.ratio, own_part=label, ratio=max(row.ratio, worst.ratio))
            where = differing.get(pair.path, "")
            stage.rows.append(replace(row, note=note, where=where, call=pair.b.call, depth=depth))
            depth += 1
    _parameter_rows(c, stage, runs, differing)
    if first is not None:
        pair, origin = first
        c.fail(stage, pair.path, origin.where, neutral(origin.judgement.note) or "in the backward pass")
        c.suggest(pair, found[pair.b.number])
        return
    bad = [row for row in stage.rows if row.part.startswith("gradient of ") and row.status == states.DIFFERS]
    if bad:
        c.fail(stage, bad[0].path, "", bad[0].note)


def _parameter_rows(c: Comparison, stage: Stage, runs: tuple[Run, Run, Run], differing: dict[str, str]) -> None:
    own, noise, exact = ({f"gradient:{n}": v for n, v in run.gradients.items()} for run in runs)
    own = {
        f"gradient:{c.parameter_names[name.partition(':')[2]]}": value
        for name, value in own.items()
        if name.partition(":")[2] in c.parameter_names
    }
    judged = judge_values(own, noise, exact, c.dtype)
    over = [name for name, item in judged.items() if item.ratio > FACTOR * c.factor]
    if over and not differing:
        floors = c.propagated({name: exact[name] for name in over})
        for name, floor in floors.items():
            again = judge(
                own[name].array, noise[name].array, exact[name].array, c.dtype,
                stored=noise[name].dtype, sampled_noise=floor,
            )  # fmt: skip
            judged[name] = replace(again, plain_ratio=judged[name].ratio)
    for name, item in judged.items():
        path, part = split_at(name.partition(":")[2], c.b.modules)
        is_over = item.ratio > FACTOR * c.factor
        status = states.LESS_EXACT if item.plain_ratio else states.PASSED
        if not item.passed:
            status = states.INHERITS if differing else states.DIFFERS if is_over else states.LESS_EXACT
        if path in differing and not item.passed:
            status = states.DIFFERS
        values = exact[name].array
        own_noise = rms_distance(noise[name].array, values)
        row = Row(path, f"gradient of {part}", values.shape, status, item.ratio, item.error, own_noise, item.scale)
        stage.rows.append(replace(row, note=item.note, depth=len(stage.rows)))


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
