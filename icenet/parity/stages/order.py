"""The order of the stages of a comparison, and what each takes from the one before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from icenet.parity.calls import larger, other_ids, replays, runs
from icenet.parity.calls.events import Run
from icenet.parity.calls.pairing import pair_calls
from icenet.parity.calls.pairs import Pair
from icenet.parity.calls.run_gradients import RunGradients
from icenet.parity.calls.runs import run_training, wants_gradients
from icenet.parity.calls.sides import ModuleError
from icenet.parity.causes.numbers import unequal_numbers
from icenet.parity.inputs import Inputs
from icenet.parity.results import status as states
from icenet.parity.results import tree
from icenet.parity.results.report import Report
from icenet.parity.results.result import Row, Stage
from icenet.parity.stages import StageFailed, forward, gradients, other_inputs, structure, training, weights
from icenet.parity.state import Comparison
from icenet.parity.yardstick import Judgement


def run_stages(c: Comparison, given: list[Inputs]) -> Report:
    """Runs the stages on each of the inputs and returns the report."""
    tree.add_modules(c)
    report = c.report
    report.inputs, report.draws = given[0].describe(), len(given)
    try:
        with c.a.eager(), c.b.eager(), np.errstate(all="ignore"):  # masks hold -inf
            for index, inputs in enumerate(given):
                _run_on(c, inputs, first=index == 0)
                if index == 0:
                    of_first = c.inputs_a, c.inputs_b, c.targets_a, c.targets_b
            other_inputs.compare_other_inputs(c, given[0], _judge_evaluation)
            c.inputs_a, c.inputs_b, c.targets_a, c.targets_b = of_first
            c.store.free()
            if c.wants("optimizer") or c.wants("training"):
                training.compare_training(c, given[0])
            c.add_notes(unequal_numbers(c))
    except StageFailed:
        pass
    except ModuleError as error:  # in training mode only
        stage = next(s for s in c.report.stages if s.status == states.NOT_RUN)
        if error is c.backward_error and c.stages["gradients"].status == states.NOT_RUN:
            stage = c.stages["gradients"]
        path = c.a.names.get(error.path, error.path) if error.side is c.a else error.path
        note = f"{'a' if error.side is c.a else 'b'} raises an error in training mode: {error.reason}"
        stage.rows.append(Row(path, "call", status=states.DIFFERS, ratio=math.inf, note=note))
        c.fail(stage, path, note=note)
    finally:
        c.store.close()
    for stage in report.stages:
        if stage.rows and stage.status == states.NOT_RUN:
            stage.status = states.PASSED
    tree.finish_modules(c)
    return report


def _run_on(c: Comparison, inputs: Inputs, first: bool) -> None:
    c.store.free()
    for side in (c.a, c.b, c.reference):
        side.loss_scale = 1.0
    depends = c.a.depends_on_mode or c.b.depends_on_mode
    with c.stage("structure") as stage:
        if first:
            structure.compare_parameters(c, stage, inputs)
        trained = evaluated = None
        if not depends or _may_evaluate_norms_alone(c):
            trained = structure.compare_training_shapes(c, stage, inputs)
        if trained is None:
            evaluated = structure.compare_shapes(c, stage, inputs)
            trained = None if depends else (evaluated[0], run_training(c, inputs, evaluated[0]))
    if first:
        with c.stage("weights") as stage:
            weights.compare_weights(c, stage)
    if not any(map(c.wants, ("forward", "loss", "gradients", "optimizer", "training"))):
        return
    with c.stage("forward") as stage:
        if first and forward.modes_differ(c, stage):
            return
        calls = None
        if trained is not None:
            norms = _evaluate_norms(c, trained[0], first) if depends else []
            calls = _replay_training(c, inputs, *trained, first, larger_too=first)
            if all(row.passed for row in norms) and (not depends or _agree(calls.found)):
                stage.rows += norms
            else:  # then each module is compared in evaluation mode first
                c.store.free()
                calls, evaluated = None, structure.compare_shapes(c, c.stages["structure"], inputs)
        if calls is None:
            assert evaluated is not None
            _judge_evaluation(c, stage, evaluated[0], first)
            three = run_training(c, inputs, evaluated[0])
            pairs, notes = pair_calls(c.a, c.b, three, c.matches)
            c.add_notes(notes)
            calls = _replay_training(c, inputs, pairs, three, first)
        note = "in training mode" if evaluated is not None and depends else ""
        forward.judge_forward(c, stage, calls.pairs, calls.found, note)
    if c.backward_error is not None:
        raise c.backward_error
    with c.stage("loss") as stage:
        gradients.judge_loss(c, stage, calls.pairs, calls.runs)
    with c.stage("gradients") as stage:
        gradients.judge_gradients(c, stage, calls.backward, calls.found)


class _Calls(NamedTuple):
    """The calls of the runs in training mode, or in the only mode that there is.

    Attributes:
        pairs, runs: The calls and the runs.
        backward: The gradients of the runs; None if they are not compared.
        found: The judgements of the replays by the number of the call in `b`.
    """

    pairs: list[Pair]
    runs: tuple[Run, Run, Run]
    backward: RunGradients | None
    found: dict[int, dict[str, Judgement]]


def _may_evaluate_norms_alone(c: Comparison) -> bool:
    """Returns whether evaluation mode needs no runs of its own, because only norms compute something else in it.

    All other modules compute in training mode what they compute in evaluation mode. A recorded reference has the
    runs of both modes.
    """
    return c.computes_reference and wants_gradients(c) and c.a.is_mode_of_norms and c.b.is_mode_of_norms


def _evaluate_norms(c: Comparison, pairs: list[Pair], first: bool) -> list[Row]:
    """Replays the modules that depend on the mode in evaluation mode; returns a row for each of their outputs."""
    c.set_mode(False)
    norms = [pair for pair in pairs if c.a.depends_on_mode_at(pair.a.path) or c.b.depends_on_mode_at(pair.path)]
    found = replays.replay_all(c, norms)
    if first:
        found |= larger.replay_statistics(c, pairs)
    c.set_mode(c.trains)
    return forward.evaluation_rows(pairs, found)


def _judge_evaluation(c: Comparison, stage: Stage, pairs: list[Pair], first: bool) -> None:
    """Replays and judges the calls of the runs in evaluation mode.

    Raises:
        StageFailed: A module differs.
    """
    again = {pair.b.number for pair in pairs if forward.is_replayed_again(c, pair)}
    if not forward.outputs_agree(pairs, c.dtype):
        again.clear()
    found = replays.replay_all(c, [pair for pair in pairs if pair.b.number not in again])
    if not _agree(found):
        found |= replays.replay_all(c, [pair for pair in pairs if pair.b.number in again])
    elif first:
        found |= larger.replay_larger(c, pairs) | larger.replay_statistics(c, pairs)
        found |= other_ids.replay_ids(c, pairs)
    forward.judge_forward(c, stage, pairs, found, "")
    if stage.status == states.FAILED:
        raise StageFailed
    runs.switch_off_dropouts(c, pairs)


def _replay_training(
    c: Comparison,
    inputs: Inputs,
    pairs: list[Pair],
    three: tuple[Run, Run, Run],
    first: bool,
    larger_too: bool = False,
) -> _Calls:
    """Replays the calls of the runs with gradients, and keeps of the runs what later stages need.

    Args:
        c, inputs, pairs, three: The comparison, the calls and the runs.
        first: Whether the inputs are the first ones.
        larger_too: Whether the calls are replayed on larger inputs as well, if all agree.
    """
    if c.wants("gradients"):
        pairs, three = runs.in_range(c, inputs, pairs, three)
    _free(c, pairs, three)
    if first:
        c.first_runs = [(float(np.asarray(run.loss.array)), run.gradients) if run.loss else None for run in three]
        c.gradients = {name: np.asarray(item.array) for name, item in three[2].gradients.items()}
        c.computed = sum(item.array.size for event in three[2].events for item in event.outputs)
    has_gradients = c.wants("gradients") and c.backward_error is None
    backward = RunGradients(c, pairs, three) if has_gradients else None
    undecided = backward.undecided() if backward else ()
    _free(c, pairs, three)
    found = replays.replay_all(c, pairs, undecided)
    if larger_too and _agree(found):
        found |= larger.replay_larger(c, pairs) | other_ids.replay_ids(c, pairs)
    return _Calls(pairs, three, backward, found)


def _free(c: Comparison, pairs: list[Pair], three: tuple[Run, Run, Run]) -> None:
    """Deletes the arrays of the runs that are not read again: all but those of the calls, and of the gradients."""
    read = [pairs[0].a, pairs[0].b, pairs[0].noise, *(run.events[0] for run in three)]
    c.store.free([run for run in c.store.runs if any(event is run.events[0] for event in read if run.events)])


def _agree(found: Mapping[int, Mapping[str, Judgement]]) -> bool:
    return all(judgement.passed for judged in found.values() for judgement in judged.values())
