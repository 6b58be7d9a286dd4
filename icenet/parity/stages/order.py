"""The order of the stages of a comparison, and what each takes from the one before."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from icenet.parity.calls import larger, replays, runs
from icenet.parity.calls.events import Run
from icenet.parity.calls.pairing import pair_calls
from icenet.parity.calls.pairs import Pair
from icenet.parity.calls.run_gradients import RunGradients
from icenet.parity.calls.runs import run_training
from icenet.parity.calls.sides import ModuleError
from icenet.parity.causes.numbers import unequal_numbers
from icenet.parity.inputs import Inputs
from icenet.parity.results import status as states
from icenet.parity.results import tree
from icenet.parity.results.report import Report
from icenet.parity.results.result import Row
from icenet.parity.stages import StageFailed, forward, gradients, structure, training, weights
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
    with c.stage("structure") as stage:
        if first:
            structure.compare_parameters(c, stage, inputs)
        depends = c.a.depends_on_mode or c.b.depends_on_mode
        pairs, three = structure.compare_shapes(c, stage, inputs, train=not depends)
    if first:
        with c.stage("weights") as stage:
            weights.compare_weights(c, stage)
    if not any(map(c.wants, ("forward", "loss", "gradients", "optimizer", "training"))):
        return
    with c.stage("forward") as stage:
        if first and forward.modes_differ(c, stage):
            return
        if depends:
            again = {pair.b.number for pair in pairs if forward.is_replayed_again(c, pair)}
            if not forward.outputs_agree(pairs, c.dtype):
                again.clear()
            found = replays.replay_all(c, [pair for pair in pairs if pair.b.number not in again])
            if not _agree(found):
                found |= replays.replay_all(c, [pair for pair in pairs if pair.b.number in again])
            elif first:
                found |= larger.replay_larger(c, pairs) | larger.replay_statistics(c, pairs)
            forward.judge_forward(c, stage, pairs, found, "")
            if stage.status == states.FAILED:
                raise StageFailed
            runs.switch_off_dropouts(c, pairs)
            three = run_training(c, inputs, pairs)
            pairs, notes = pair_calls(c.a, c.b, three, c.matches)
            c.add_notes(notes)
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
        if first and not depends and _agree(found):
            found |= larger.replay_larger(c, pairs)
        forward.judge_forward(c, stage, pairs, found, "in training mode" if depends else "")
    if c.backward_error is not None:
        raise c.backward_error
    with c.stage("loss") as stage:
        gradients.judge_loss(c, stage, pairs, three)
    with c.stage("gradients") as stage:
        gradients.judge_gradients(c, stage, backward, found)


def _free(c: Comparison, pairs: list[Pair], three: tuple[Run, Run, Run]) -> None:
    """Deletes the arrays of the runs that are not read again: all but those of the calls, and of the gradients."""
    read = [pairs[0].a, pairs[0].b, pairs[0].noise, *(run.events[0] for run in three)]
    c.store.free([run for run in c.store.runs if any(event is run.events[0] for event in read if run.events)])


def _agree(found: Mapping[int, Mapping[str, Judgement]]) -> bool:
    return all(judgement.passed for judged in found.values() for judgement in judged.values())
