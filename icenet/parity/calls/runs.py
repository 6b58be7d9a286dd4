"""Runs of both sides of a comparison with the loss and its gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.parity import align
from icenet.parity import inputs as drawing
from icenet.parity.calls.events import Run
from icenet.parity.calls.pairing import pair_calls
from icenet.parity.calls.pairs import Pair
from icenet.parity.calls.sides import ModuleError
from icenet.parity.calls.targets import Targets
from icenet.parity.fp16 import FP16_SCALES, fits_fp16
from icenet.parity.inputs import Inputs
from icenet.parity.results.result import Row
from icenet.parity.results.rows import index_of
from icenet.parity.state import Comparison
from icenet.parity.yardstick import judge

Array = npt.NDArray[Any]


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
            c.inputs_b = values
            return run
        except ModuleError as error:
            failures.append(error)
    raise failures[0]


def run_training(c: Comparison, inputs: Inputs, pairs: list[Pair]) -> tuple[Run, Run, Run]:
    """Runs all sides in training mode with the loss and its gradients.

    Raises:
        AmbiguousAxes: The axes of the outputs of `a` are not known, because there are no pairs.
    """
    c.set_mode(c.trains)
    loss_a, loss_b = c.losses or (None, None)
    wants = any(map(c.wants, ("loss", "gradients", "optimizer", "training")))
    c.targets_b = Targets(c.seed, c.reference.tools)
    exact = c.reference_run(inputs, loss_b, c.targets_b, wants)
    noise = c.b.record(inputs.given, c.inputs_b, c.store, loss_b, c.targets_b, wants)
    hows = {i: how for i, _, how in pairs[0].outputs} if pairs else None
    c.targets_a = c.targets_b.on(c.a.tools, hows, c.a.backend == c.b.backend)
    own = c.a.record(inputs.given, inputs.values, c.store, loss_a, c.targets_a, wants)
    check_draws(c, inputs)
    return own, noise, exact


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
    """Raises Draws if a module draws random numbers without a key in the last run."""
    for side, values in ((c.a, inputs.values), (c.b, c.inputs_b)):
        if side.drew:
            path = side.drawing_module(inputs.given, values)
            name = side.names.get(path, path) if path else "the model"
            raise Draws(f"{name} of {'a' if side is c.a else 'b'}")


def agrees_in_samples(c: Comparison, pairs: list[Pair], row: Row) -> bool:
    """Returns whether the error of an output of the model is that of its modules, propagated."""
    j = index_of(row.part)
    i, how = next((i, how) for i, other, how in pairs[0].outputs if other == j)
    ours = align.to_torch(how, pairs[0].a.outputs[i].array)
    theirs, exact = pairs[0].noise.outputs[j], pairs[0].b.outputs[j]
    floor = c.propagated({f"output:{j}": exact}, pairs, gradients=False).get(f"output:{j}")
    return judge(ours, theirs.array, exact.array, c.dtype, stored=theirs.dtype, sampled_noise=floor).passed


class Draws(Exception):
    """A module draws random numbers without a key, so that its runs cannot be compared.

    Args:
        place: The path of the module, and its side.
    """

    def __init__(self, place: str) -> None:
        super().__init__(f"{place} draws random numbers without a key")
        self.place = place
