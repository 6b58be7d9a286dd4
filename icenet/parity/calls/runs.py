"""Runs of both sides of a comparison with the loss and its gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from icenet.parity import align
from icenet.parity import inputs as drawing
from icenet.parity.calls import module_copy
from icenet.parity.calls.events import Run
from icenet.parity.calls.pairing import pair_calls
from icenet.parity.calls.pairs import Pair
from icenet.parity.calls.sides import ModuleError, Side
from icenet.parity.calls.targets import Targets, trains_first_only
from icenet.parity.fp16 import FP16_SCALES, fits_fp16
from icenet.parity.inputs import Inputs
from icenet.parity.measures import rms, rms_distance
from icenet.parity.results.result import Row
from icenet.parity.state import Comparison
from icenet.parity.yardstick import judge

Array = npt.NDArray[Any]
T = TypeVar("T")

_SAME_MASK = 0.01
"""Largest relative distance of the outputs of a module that has the same mask on both sides."""


def reference_run(c: Comparison, inputs: Inputs, *arguments: Any) -> Run:
    """Returns the run of the reference, and sets the inputs in its axes."""
    same = c.a.backend == c.b.backend
    candidates = [drawing.for_reference(inputs, c.b, c.options["layout"], same)]
    if c.options["layout"] is None and not same:
        for how in (align.SAME, align.MOVED):
            other = drawing.moved(inputs, how)
            if [v.array.shape for v in other] not in [[v.array.shape for v in known] for known in candidates]:
                candidates.append(other)
    failures: list[ModuleError] = []
    for values in candidates:
        try:
            run = c.reference.record(inputs.given, values, c.store, *arguments)
        except ModuleError as error:
            failures.append(error)
            continue
        c.inputs_b = values
        # the runs in the dtype under test have half its bytes, and the gradients of the three as many as all values
        has_gradients = len(arguments) > 2 and arguments[2]
        c.store.check_space(run, 3 if wants_gradients(c) and not has_gradients else 1)
        return run
    raise failures[0]


def wants_gradients(c: Comparison) -> bool:
    """Returns whether a run with the loss and its gradients is to be compared."""
    return c.backward_error is None and any(map(c.wants, ("loss", "gradients", "optimizer", "training")))


def run_training(c: Comparison, inputs: Inputs, pairs: list[Pair]) -> tuple[Run, Run, Run]:
    """Runs all sides in training mode with the loss and its gradients.

    Modules that draw random numbers without a key draw equal ones. If they cannot, they are kept in evaluation mode,
    and if they draw in that mode too, the whole model is. If the backward pass of `a` raises an error, that is kept
    (`Comparison.backward_error`), and the runs have no gradients.

    Raises:
        AmbiguousAxes: The axes of the outputs of `a` are not known, because there are no pairs.
        Draws: There are no pairs, or modules draw in evaluation mode, too.
    """
    while True:
        try:
            found = with_equal_draws(c, lambda: _run_training(c, inputs, pairs))
        except Draws as error:
            if not pairs or not c.trains:
                raise
            if not error.path or not _switch_off(c, error):
                c.trains = False
                c.report.draws_in = error.place
                c.add_notes([f"{error} in training mode: gradients are compared in evaluation mode"])
        else:
            if not _mirror_draws(c, pairs, found):
                return found


def _mirror_draws(c: Comparison, pairs: list[Pair], runs: tuple[Run, Run, Run]) -> bool:
    """Mirrors the uniform numbers of the modules of a class of `a` that make masks of them in another way than `b`.

    Returns:
        Whether a run must be repeated, because the numbers were changed: the outputs of such a module differ.
    """
    if c.draws is None:
        return False
    own, exact = runs[0].by_call(), runs[2].by_call()
    hows = {pair.path: pair.outputs for pair in reversed(pairs)}
    mixed = c.draws.mixed()
    for path in mixed:
        ours = c.a.own_path(path) or ""
        if path in c.mirrored or (ours, 0) not in own or (path, 0) not in exact:
            continue
        x, y = own[ours, 0].outputs, exact[path, 0].outputs
        found = [(align.to_torch(how, x[i].array), y[j].array) for i, j, how in hows.get(path, ()) if y[j].is_float]
        if all(p.shape == q.shape and rms_distance(p, q) <= _SAME_MASK * rms(q) for p, q in found):
            continue
        same = {p for p in mixed if c.a.classes[c.a.own_path(p) or ""] == c.a.classes[ours]}
        if path in c.draws.mirrored:  # that is not the reason
            c.draws.mirrored -= same
            c.mirrored |= same
        else:
            c.draws.mirrored |= same
        return True
    return False


def with_equal_draws(c: Comparison, run: Callable[[], T]) -> T:
    """Makes runs of all sides; if modules draw random numbers without a key, again with equal ones on all sides.

    Raises:
        Draws: They cannot be made equal.
    """
    try:
        return run()
    except Draws:
        if not (c.share_draws() or (c.draws is not None and c.draws.pair_others())):
            raise
    return with_equal_draws(c, run)


def _switch_off(c: Comparison, error: Draws) -> bool:
    """Keeps a module in evaluation mode on all sides; returns whether it was not."""
    path = error.path
    changed = [side.switch_off(path) for side in (c.a, c.b, c.reference)]
    if not any(changed):
        return False
    c.report.modes_off.append(path)
    c.add_notes([f"{error}: {path} itself is compared in evaluation mode"])
    return True


def switch_off_dropouts(c: Comparison, pairs: list[Pair]) -> None:
    """Keeps dropouts in evaluation mode whose calls get other rows on each side, or are made in another order.

    Their masks depend on the rows and on the number of the call, so they are other ones.
    """
    others = {inner.path for pair in pairs for inner in pair.apart}
    others |= {pair.path for pair in pairs if pair.a.call != pair.b.call}
    for path, module in c.b.modules.items() if c.computes_reference else ():
        if path not in others or not module_copy.may_draw(module) or not c.b.depends_on_mode_at(path):
            continue
        changed = [side.switch_off(path) for side in (c.a, c.b, c.reference)]
        if any(changed):
            c.report.modes_off.append(path)
            c.add_notes([f"{path} gets other rows in a than in b, or in another order, and so other masks: left out"])


def _run_training(c: Comparison, inputs: Inputs, pairs: list[Pair]) -> tuple[Run, Run, Run]:
    c.set_mode(c.trains)
    # the keys of their masks are those of other rows, or of other layers, on each side
    if c.exchanged.intersection(c.b.dropouts()) or _has_other_dropouts(c):
        c.share_draws()
    loss_a, loss_b = c.losses or (None, None)
    wants = wants_gradients(c)
    c.targets_b = Targets(c.seed, c.reference.tools, first_only=trains_first_only(c.reference))
    exact = c.reference_run(inputs, loss_b, c.targets_b, wants)
    noise = c.b.record(inputs.given, c.inputs_b, c.store, loss_b, c.targets_b, wants)
    hows = {i: how for i, _, how in pairs[0].outputs} if pairs else None
    c.targets_a = c.targets_b.on(c.a.tools, hows, c.a.backend == c.b.backend)
    try:
        own = c.a.record(inputs.given, inputs.values, c.store, loss_a, c.targets_a, wants)
    except ModuleError as error:
        if not error.in_backward or not pairs:
            raise
        error.path = _failing_backward(c, pairs)
        c.backward_error = error  # the forward pass is judged first
        return _run_training(c, inputs, pairs)
    check_draws(c, inputs)
    return own, noise, exact


def _has_other_dropouts(c: Comparison) -> bool:
    """Returns whether both sides have dropouts without a counterpart, as one that is called twice in place of two."""
    lonely_a = (match.a for match in c.matches if match.b is None and match.a is not None)
    lonely_b = (match.b for match in c.matches if match.a is None and match.b is not None)
    return any(map(c.a.dropout_rate, lonely_a)) and any(map(c.b.dropout_rate, lonely_b))


def _failing_backward(c: Comparison, pairs: list[Pair]) -> str:
    """Returns the path of the innermost module of `a` whose backward pass alone raises an error; "" without one."""
    for pair in reversed(pairs):  # those within a module first
        whole = replace(pair, children=[])
        if pair.obstacle or not c.computes_reference:
            continue
        whole.parameters = [n for n in c.reference.parameters_within(pair.path) if c.a.has_parameter(pair, n)]
        try:
            c.a.replay(c.replay_of(whole, True))
        except align.ReplayError:
            with contextlib.suppress(align.ReplayError):
                c.a.replay(c.replay_of(whole, False))
                return pair.a.path
    return ""


def in_range(
    c: Comparison, inputs: Inputs, pairs: list[Pair], three: tuple[Run, Run, Run]
) -> tuple[list[Pair], tuple[Run, Run, Run]]:
    """Repeats the runs of all sides with a smaller loss while gradients overflow in fp16, as training does.

    Which gradients near the limit overflow depends on the last bit, and on whether the derivative of a function is
    computed in fp16 or fp32. Gradients that are not finite with the smallest scale are a difference.
    """
    if c.dtype != "fp16" or not c.computes_reference:
        return pairs, three
    for scale in FP16_SCALES[1:]:
        losses = [float(np.asarray(run.loss.array)) for run in three if run.loss is not None]
        found = [_all_gradients(run) for run in three]
        if not losses or not np.isfinite(losses).all() or fits_fp16(found[2], found[:2]):
            break
        finite = [all(np.isfinite(array).all() for array in arrays.values()) for arrays in found[:2]]
        only = " in a only" if finite == [False, True] else " in b only" if finite == [True, False] else ""
        for side in (c.a, c.b, c.reference):
            side.loss_scale = scale
        three = run_training(c, inputs, pairs)
        pairs = pair_calls(c.a, c.b, three, c.matches)[0]
        reason = "are near the limit of" if all(finite) else "overflow in"
        c.add_notes([f"gradients {reason} fp16{only}: the loss is multiplied by {scale:g}"])
    return pairs, three


def _all_gradients(run: Run) -> dict[str, Array]:
    """Returns the gradients of a run by the parameters, and by the outputs of all calls."""
    found = {name: np.asarray(item.array) for name, item in run.gradients.items()}
    for event in run.events:
        for index, item in enumerate(event.gradients):
            if item is not None:
                found[f"{event.number} {index}"] = np.asarray(item.array)
    return found


def check_draws(c: Comparison, inputs: Inputs) -> None:
    """Raises Draws if a module draws random numbers without a key in the last run, that are not equal."""
    for side, values in ((c.a, inputs.values), (c.b, c.inputs_b)):
        if side.drew:
            path = side.drawing_module(inputs.given, values) or ""
            raise Draws(
                f"{side.names.get(path, path) or 'the model'} of {'a' if side is c.a else 'b'}", _place(side, path)
            )
    if c.draws is not None and (unmatched := c.draws.unmatched()) is not None:
        place = c.a.names.get(unmatched, unmatched) or "the model"
        raise Draws(place, _place(c.a, unmatched), "draws other random numbers on each side")


def _place(side: Side, path: str) -> str:
    """Returns the path in the reference of the innermost module around a module that both sides have."""
    while path and path not in side.names:
        path = path.rpartition(".")[0]
    return side.names.get(path, "")


def agrees_in_samples(c: Comparison, pairs: list[Pair], row: Row) -> bool:
    """Returns whether the error of an output of the model is that of its modules, propagated."""
    i, j, how = next(item for item in pairs[0].outputs if pairs[0].b.output_label(item[1]) == row.part)
    ours = align.to_torch(how, pairs[0].a.outputs[i].array)
    theirs, exact = pairs[0].noise.outputs[j], pairs[0].b.outputs[j]
    floor = c.propagated({f"output:{j}": exact}, pairs, gradients=False).get(f"output:{j}")
    return judge(ours, theirs.array, exact.array, c.dtype, stored=theirs.dtype, sampled_noise=floor).passed


class Draws(Exception):
    """A module draws random numbers that are not equal on both sides, so that its runs cannot be compared.

    Args:
        place: The module, and its side.
        path: The path in the reference of the innermost module around it that both sides have.
        reason: What it does.
    """

    def __init__(self, place: str, path: str, reason: str = "draws random numbers without a key") -> None:
        super().__init__(f"{place} {reason}")
        self.place, self.path = place, path
