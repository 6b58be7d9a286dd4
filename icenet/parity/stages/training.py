"""The stages `optimizer` and `training`: updates on equal gradients, and the losses of free-running steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core.messages import option
from icenet.parity.calls.pairs import Sample
from icenet.parity.calls.sides import Side
from icenet.parity.causes.optimizers import CORRECTION, ams_grad_differs, suggest_update
from icenet.parity.curves import judge_curve
from icenet.parity.inputs import Inputs
from icenet.parity.measures import rms, rms_distance, squared_distance
from icenet.parity.nearby import Perturbation
from icenet.parity.resampling import LIMITS, SAMPLES, Samples, judge_values, sure_limit
from icenet.parity.results import status as states
from icenet.parity.results.result import Row, Stage
from icenet.parity.results.rows import is_in, split_at
from icenet.parity.state import Comparison
from icenet.parity.trace import Value
from icenet.parity.yardstick import FACTOR, judge

Array = npt.NDArray[Any]

SMALL = 1_000_000
"""Number of parameters, and of values that all modules return, up to which two steps are trained; above it, one."""
_PART = 1 << 12
"""Number of values of a parameter that the default optimizer updates: it changes each value alone."""
_SCALES = (1.0, 0.5, -1.0)
"""Factors of the gradients of successive updates, which show the moments of an optimizer and their correction."""


def compare_training(c: Comparison, inputs: Inputs) -> None:
    """Compares optimizer steps on equal gradients, and the losses of free-running steps."""
    back = {theirs: ours for ours, theirs in c.parameter_names.items()}
    if c.wants("optimizer") and (rows := [*_frozen_parameters(c, back), *_frozen_layers(c)]):
        with c.stage("optimizer") as stage:
            stage.rows += rows
            c.fail(stage, rows[0].path, note=rows[0].note)
            c.report.cause = _way_out(c)
    if not c.gradients:
        return _skip(c, "there are no trainable parameters")
    if c.dtype != "fp32":
        fp32 = option("dtype='fp32'")
        return _skip(c, f"parameters are updated in fp32: compare with {fp32}")
    names = [name for name in c.gradients if name in back]
    rate = c.rate(names, c.gradients)
    for side in (c.a, c.b, c.reference):
        side.rate = rate
    optimizers = c.optimizers or (None, None)
    if c.wants("optimizer"):
        with c.stage("optimizer") as stage:
            _judge_updates(c, stage, names, back, c.gradients, optimizers)
    if c.wants("training"):
        with c.stage("training") as stage:
            _judge_losses(c, stage, inputs, optimizers)


def _skip(c: Comparison, note: str) -> None:
    """Marks both stages as skipped."""
    for name in ("optimizer", "training"):
        if c.wants(name):
            c.stages[name].status, c.stages[name].note = states.SKIPPED, note


def _judge_losses(c: Comparison, stage: Stage, inputs: Inputs, optimizers: tuple[Any, Any]) -> None:
    """Compares the losses of free-running steps."""
    size = max(c.computed, sum(math.prod(shape) for shape in c.b.shapes.values()))
    steps = c.steps if c.steps is not None else 2 if size <= SMALL else 1
    curves = [_train(c, c.a, inputs, steps, optimizers)]
    is_equal = c.jumps and steps == 1  # free-running steps of `b` would hardly agree
    if is_equal and (found := _ratios_of_equal_steps(c, inputs, 1, optimizers, curves[0])) is not None:
        _note_equal_steps(c, stage)
        return _add_quick_rows(c, stage, curves[0], *found)
    curves.append(_train(c, c.b, inputs, steps, optimizers))
    if (ratios := _quick_ratios(c, curves)) is not None:
        return _add_quick_rows(c, stage, curves[0], ratios, curves[1])
    curves.append(_train(c, c.reference, inputs, steps, optimizers))
    c.report.losses = dict(zip(("a", "b", "reference"), curves, strict=True))
    # the reference is of float64, which may hold what overflows on both sides
    ends = [step for step, losses in enumerate(zip(*curves[:2], strict=True)) if not any(map(math.isfinite, losses))]
    if ends:
        stage.note = f"the losses of a and b are infinite or NaN after {ends[0]} steps"
        curves = [curve[: ends[0]] for curve in curves]
    if not curves[0]:
        return
    losses = enumerate(zip(*curves, strict=True))
    left = [step for step, (a, b, r) in losses if math.isfinite(a + r) and not math.isfinite(b)]
    if left:  # by its own noise, which is no smaller than at the steps before: those give the noise of a
        stage.note = f"the loss of b is infinite or NaN after {left[0]} steps; a is compared with the reference"
        curves[1] = [r if step in left else b for step, (b, r) in enumerate(zip(*curves[1:], strict=True))]
    judged = judge_curve(curves[0], curves[1], curves[2])
    allowed = FACTOR * c.factor
    noise = np.maximum(judged.noise, c.loss_noise)
    ratios = np.where(np.isfinite(judged.ratios), judged.gap / noise, judged.ratios)
    if float(ratios.max()) > allowed:
        ratios = _judge_again(
            c, stage, inputs, optimizers, curves, np.where(ratios < np.inf, judged.gap, np.inf), noise
        )
    _add_rows(c, stage, ratios, curves[2], judged.gap, judged.noise)
    if float(ratios.max()) > allowed:
        c.fail(stage, "", "in the training steps", f"the losses differ at step {judged.worst_step}")


def _add_rows(c: Comparison, stage: Stage, ratios: Array, losses: Sequence[float], gap: Array, noise: Array) -> None:
    """Adds a row for each loss, given those of `b` or the reference, the distance of `a` from `b`, and its noise."""
    for step, ratio in enumerate(ratios):
        is_within = ratio <= FACTOR * c.factor
        status = states.PASSED if ratio <= FACTOR else states.LESS_EXACT if is_within else states.DIFFERS
        row = Row("", f"loss after {step} steps", (), status, float(ratio), float(gap[step]))
        stage.rows.append(replace(row, noise=float(noise[step]), scale=abs(losses[step]), depth=step))


def _known_noise(c: Comparison) -> float:
    """Returns the noise that the losses of all steps have at least: that of the first one, and of equal outputs."""
    _, theirs, exact = c.first_runs
    known = 0.0 if theirs is None or exact is None else max(c.loss_noise, abs(theirs[0] - exact[0]))
    return known if known and math.isfinite(known) else math.nan  # which no ratio passes


def _train(c: Comparison, side: Side, inputs: Inputs, steps: int, optimizers: tuple[Any, Any]) -> list[float]:
    """Returns the losses of free-running steps of a side."""
    loss_a, loss_b = c.losses or (None, None)
    if side is c.a:
        values, loss, targets, optimizer, first = inputs.values, loss_a, c.targets_a, optimizers[0], c.first_runs[0]
    else:
        first = c.first_runs[1 if side is c.b else 2]
        values, loss, targets, optimizer = c.inputs_b, loss_b, c.targets_b, optimizers[1]
    return side.train_steps(inputs.given, values, loss, targets, optimizer, steps, first)


def _quick_ratios(c: Comparison, curves: Sequence[Sequence[float]]) -> Array | None:
    """Returns the ratios of the losses of `a` and `b` to the noise that is known without those of the reference.

    Returns:
        None if one is over the tolerance. The noise of the steps is no smaller, so the others pass for certain.
    """
    if not c.computes_reference or not np.isfinite(curves).all():
        return None
    ratios: Array = np.abs(np.subtract(curves[0], curves[1])) / _known_noise(c)
    return ratios if float(ratios.max()) <= FACTOR * c.factor else None


def _add_quick_rows(
    c: Comparison, stage: Stage, own: Sequence[float], ratios: Array, theirs: Sequence[float]
) -> None:
    """Adds the rows of losses that pass without those of the reference, given those of `a` and `b`."""
    c.report.losses = {"a": list(own), "b": list(theirs)}
    noise = np.full(len(ratios), _known_noise(c))
    _add_rows(c, stage, ratios, theirs, np.abs(np.subtract(own, theirs)), noise)


def _note_equal_steps(c: Comparison, stage: Stage) -> None:
    places = f" at ties of {', '.join(path or 'the model' for path in sorted(c.ties))}" if c.ties else ""
    stage.note = f"compared with equal gradients in each step, because gradients differ{places} within the noise"


def _judge_again(
    c: Comparison,
    stage: Stage,
    inputs: Inputs,
    optimizers: tuple[Any, Any],
    curves: Sequence[Sequence[float]],
    gap: Array,
    noise: Array,
) -> Array:
    """Returns the ratios of losses over the tolerance with all the noise that free-running steps have.

    Args:
        c, stage, inputs, optimizers: The comparison.
        curves: The losses of `a`, `b` and the reference.
        gap, noise: The distance of `a` from `b`, and the noise that is known, at each step.
    """
    if c.optimizers is not None:  # 1 - beta^t is rounded in fp32 in MLX: that scales the updates
        changes = np.cumsum(np.abs(np.diff(curves[2], prepend=curves[2][0])))
        noise = np.maximum(noise, CORRECTION * changes)
    ratios: Array = gap / noise
    over = np.flatnonzero(~(ratios <= FACTOR))
    if not over.size:
        return ratios
    last = int(over[-1])  # no later step is trained again; before the first one that is a forward pass alone

    def with_samples() -> Array | None:
        return _sampled_ratios(c, inputs, last, optimizers, gap[: last + 1], noise[: last + 1])

    def with_equal_steps() -> Array | None:
        found = _ratios_of_equal_steps(c, inputs, last, optimizers, curves[0])
        if found is None:
            return None
        _note_equal_steps(c, stage)
        return found[0]

    # a single step with equal gradients takes less time than samples
    for judge_steps in (with_equal_steps, with_samples) if len(curves[0]) == 2 else (with_samples, with_equal_steps):
        if (found := judge_steps()) is not None:
            ratios[: last + 1] = found
            break
    return ratios


def _ratios_of_equal_steps(
    c: Comparison, inputs: Inputs, last: int, optimizers: tuple[Any, Any], own: Sequence[float]
) -> tuple[Array, list[float]] | None:
    """Returns the ratios of the losses if `b` takes its steps with the gradients of `a`, and its losses.

    Gradients that agree may be unequal and change the losses otherwise: a value of the run is on the other side of an
    edge in `a`, such as the 0 of a ReLU, or the frameworks choose other gradients at ties. Then each step is compared
    alone: its loss after equal updates, and its gradients at equal weights, as in the stage `gradients`.

    Args:
        c, inputs, optimizers: The comparison.
        last: Number of steps.
        own: The losses of `a`.

    Returns:
        None if a step differs.
    """
    first, noisy, exact = c.first_runs
    if not c.computes_reference or first is None or noisy is None or exact is None:
        return None
    is_judged = c.stages["gradients"].status == states.PASSED  # at the weights of the first step
    steps: list[Mapping[str, Value]] = []
    modules: list[list[Any]] = [[], []]

    def keep(side: Side, step: int) -> None:
        if step or not is_judged:
            modules[side is not c.a].append(side.tools.detached(side.module))

    def of_a(step: int, gradients: Mapping[str, Value]) -> Mapping[str, Value]:
        keep(c.a, step)
        steps.append({c.parameter_names[n]: value for n, value in gradients.items() if n in c.parameter_names})
        return gradients

    def of_b(step: int, gradients: Mapping[str, Value]) -> Mapping[str, Value]:
        keep(c.b, step)
        return of_reference(step, gradients)

    def of_reference(step: int, gradients: Mapping[str, Value]) -> Mapping[str, Value]:
        return {name: steps[step].get(name, value) for name, value in gradients.items()}

    loss_a, loss_b = c.losses or (None, None)
    if last == 1:  # its gradients are known
        of_a(0, first[1])
    else:
        c.a.train_steps(inputs.given, inputs.values, loss_a, c.targets_a, optimizers[0], last, first, of_a)
    given = inputs.given, c.inputs_b, loss_b, c.targets_b, optimizers[1], last
    curve = c.b.train_steps(*given, noisy, of_b)
    gap = np.abs(np.subtract(own[: last + 1], curve))
    ratios: Array = gap / _known_noise(c)  # most steps pass by it
    if not float(ratios.max()) <= FACTOR * c.factor:
        judged = judge_curve(own[: last + 1], curve, c.reference.train_steps(*given, exact, of_reference))
        ratios = np.where(np.isfinite(judged.ratios), gap / np.maximum(judged.noise, c.loss_noise), np.inf)
    if float(ratios.max()) > FACTOR * c.factor:
        return None
    agrees = all(c.gradients_agree(inputs, *pair) for pair in zip(*modules, strict=True))
    return (ratios, curve) if agrees else None


def _curve_samples(
    c: Comparison, inputs: Inputs, steps: int, given: tuple[Any, Any]
) -> Samples[Callable[[int], Any]]:
    loss_b = (c.losses or (None, None))[1]

    def sampled(side: Side, rounds: bool, in_order: bool = False) -> Callable[[int], Any]:
        def sample(index: int) -> list[float]:
            with side.nearby(Sample(index, rounds, in_order), c.inputs_b) as moved:
                return side.train_steps(inputs.given, moved, loss_b, c.targets_b, given[1], steps)

        return sample

    in_order = sampled(c.b, True, True) if c.b.backend == "torch" else None
    return Samples(sampled(c.reference, False), sampled(c.b, True), None, in_order)


def _judge_updates(
    c: Comparison,
    stage: Stage,
    names: list[str],
    back: Mapping[str, str],
    gradients: Mapping[str, Array],
    optimizers: tuple[Any, Any],
) -> None:
    """Compares the parameters after steps on equal gradients."""
    if ams_grad_differs(c, optimizers):
        stage.rows.append(Row("", "", status=states.DIFFERS, ratio=math.inf, note="AMSGrad in b, not in a"))
    rows = _first_rows(c, names, back, gradients)
    sequence = update_gradients({n: gradients[n][: rows[n]] if n in rows else gradients[n] for n in names}, names)
    updated = []
    for side in (c.a, c.b, c.reference):
        is_test = side is c.a
        given = sequence
        if is_test:
            given = [{back[n]: g for n, g in step.items()} for step in sequence]
        kept = {back[n]: count for n, count in rows.items()} if is_test else rows
        found = side.updated(optimizers[0 if is_test else 1], given, rows=kept)
        if is_test:
            found = {c.parameter_names[n]: array for n, array in found.items() if n in c.parameter_names}
        updated.append(found)
    ours, theirs, exact = updated
    valued = [{f"parameter:{n}": Value(v[n], "fp32") for n in names if n in ours and n in theirs} for v in updated]
    samples = _update_samples(c, sequence, optimizers[1], rows)
    judgements = judge_values(valued[0], valued[1], valued[2], "fp32", samples)
    for name in names:
        if f"parameter:{name}" not in judgements:
            continue
        path, part = split_at(name, c.b.modules)
        judged = judgements[f"parameter:{name}"]
        if not judged.passed:  # 1 - beta^t is rounded in fp32 in MLX
            before = c.reference.weights()[name]
            least = CORRECTION * rms(exact[name] - (before[: rows[name]] if name in rows else before))
            judged = judge(ours[name], theirs[name], exact[name], "fp32", min_noise=least)
        status = states.PASSED if judged.passed else states.DIFFERS
        own_noise = rms_distance(theirs[name], exact[name])
        shape = gradients[name].shape
        row = Row(path, f"{part} after {len(_SCALES)} updates", shape, status, judged.ratio, judged.error)
        stage.rows.append(replace(row, noise=own_noise, scale=judged.scale, depth=len(stage.rows)))
    bad = [row for row in stage.rows if not row.passed]
    if bad:
        note = bad[0].note or f"the optimizer: {len(bad)} of {len(stage.rows)} parameters differ after its updates"
        c.fail(stage, bad[0].path, "in the optimizer" if not bad[0].note else "", note)
        if not bad[0].note and not rows:
            c.report.cause = suggest_update(c, back, sequence, updated, optimizers[1])


def _update_samples(
    c: Comparison, sequence: Sequence[Mapping[str, Array]], optimizer: Any, rows: Mapping[str, int]
) -> Samples[Callable[[int], dict[str, Value]]]:
    """Returns the updates of `b` and of the reference in nearby problems."""

    def sampled(side: Side, rounds: bool) -> Callable[[int], dict[str, Value]]:
        def sample(index: int) -> dict[str, Value]:
            perturb = Perturbation("fp32", index, rounds)
            steps = [
                {n: perturb.array(g, "gradient", n, k) for n, g in step.items()} for k, step in enumerate(sequence)
            ]
            with side.nearby(Sample(index, rounds), []):
                found = side.updated(optimizer, steps, rows=rows)
            return {f"parameter:{n}": Value(array, "fp32") for n, array in found.items()}

        return sample

    return Samples(sampled(c.reference, False), sampled(c.b, True))


def _first_rows(
    c: Comparison, names: Sequence[str], back: Mapping[str, str], gradients: Mapping[str, Array]
) -> dict[str, int]:
    """Returns how many rows of the large parameters are updated, by path in `b`: of those that are left out, all.

    An optimizer of the user updates all. The default one changes each value alone, so a part shows as much.
    """
    if c.optimizers is not None or not c.computes_reference:
        return {}
    own = c.first_runs[0][1] if c.first_runs[0] is not None else {}
    large = [name for name in names if gradients[name].size > _PART and back[name] in own]
    shapes = {name: gradients[name].shape for name in large}
    return {
        name: max(1, _PART * shape[0] // gradients[name].size)
        for name, shape in shapes.items()
        if own[back[name]].array.shape == shape
    }


def _frozen_parameters(c: Comparison, back: Mapping[str, str]) -> Iterator[Row]:
    """Yields a row for each parameter that only one side trains, given the names in `a` by those in `b`."""
    trained = c.a.trainable_names, c.b.trainable_names
    frozen = [name for name in c.b.shapes if name in trained[1] and back.get(name) and back[name] not in trained[0]]
    extra = [theirs for ours, theirs in c.parameter_names.items() if ours in trained[0] and theirs not in trained[1]]
    for name, which in (*((n, "a") for n in frozen), *((n, "b") for n in extra)):
        path, part = split_at(name, c.b.modules)
        note = f"{part} is frozen in {which}, and trained in {'b' if which == 'a' else 'a'}"
        yield Row(path, part, status=states.DIFFERS, ratio=math.inf, note=note)


def _way_out(c: Comparison) -> str:
    """Returns what to change if a parameter is frozen on one side only."""
    if c.a.trainable_names and c.b.trainable_names:
        return "freeze it on both sides or on none, with freeze() of MLX and requires_grad_() of PyTorch"
    which, other = ("b", "a") if c.a.trainable_names else ("a", "b")
    alone = option("stages=['forward']")
    return f"all of {which} is frozen: freeze {other}, too, unfreeze {which}, or compare {alone} alone"


def _frozen_layers(c: Comparison) -> Iterator[Row]:
    """Yields a row for each layer with other parameters on each side that is frozen in another way.

    Their parameters do not correspond, so it is compared whether all, some or none are frozen.
    """
    for path in (path for path in c.b.modules if path in c.different and c.a.own_path(path) is not None):
        own = c.a.own_path(path) or ""
        frozen = []
        for side, at in ((c.a, own), (c.b, path)):
            names = [name for name in side.shapes if is_in(name, at)]
            fixed = [name[len(at) + 1 :] if at else name for name in names if name not in side.trainable_names]
            frozen.append(["all"] if fixed and len(fixed) == len(names) else fixed)
        kinds = [which if which in ([], ["all"]) else ["some"] for which in frozen]
        if kinds[0] != kinds[1]:
            texts = [", ".join(which) or "none" for which in frozen]
            note = f"frozen parameters: {texts[0]} in a, {texts[1]} in b"
            yield Row(path, "", status=states.DIFFERS, ratio=math.inf, note=note)


def default_rate(names: Sequence[str], weights: Mapping[str, Array], gradients: Mapping[str, Array]) -> float:
    """Returns the learning rate with which a step changes the weights by about a hundredth."""
    sizes = [
        math.sqrt(sum(rms(a) ** 2 * a.size for a in arrays))
        for arrays in ((weights[n] for n in names), (gradients[n] for n in names))
    ]
    return float(np.float32(0.01 * sizes[0] / sizes[1])) if sizes[1] and math.isfinite(sizes[1]) else 0.1


def update_gradients(gradients: Mapping[str, Array], names: Sequence[str]) -> list[dict[str, Array]]:
    """Returns the gradients of successive updates of some parameters, given those of a run."""
    single = {name: np.asarray(gradients[name], np.float32) for name in names}
    return [single if scale == 1 else {n: a * np.float32(scale) for n, a in single.items()} for scale in _SCALES]


def _sampled_ratios(
    c: Comparison, inputs: Inputs, last: int, optimizers: tuple[Any, Any], gap: Array, noise: Array
) -> Array | None:
    """Returns the ratios of the distance of two training curves to the noise of nearby runs; None if one is over.

    Most are far within the noise of the first runs, or pass for certain after a few; then no more are trained.

    Args:
        c, inputs, optimizers: The comparison.
        last: Number of steps.
        gap, noise: The distance and the known noise at each step.
    """
    samples = _curve_samples(c, inputs, last, optimizers)
    reference = functools.cache(samples.reference)
    # either noise is enough, and that of sums term by term, the larger one, mostly shows it after one sample
    for run in filter(None, (samples.in_order, samples.torch)):
        squares = np.zeros(gap.shape)
        for index in range(SAMPLES):
            squares += squared_distance(run(index), reference(index))
            ratios: Array = gap / np.maximum(np.sqrt(squares / (index + 1)), noise)
            worst = float(ratios.max())
            if worst <= max(FACTOR / 2, sure_limit(index + 1, SAMPLES)):
                return ratios
            if worst > LIMITS.get(index + 1, math.inf):
                break
    return None
