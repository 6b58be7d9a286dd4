"""The stage `structure`: the tree of the modules, the parameters of both sides, the shapes of all arrays."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import numpy.typing as npt

from icenet.core.errors import UsageError
from icenet.core.messages import option
from icenet.core.weights import layout
from icenet.parity import align
from icenet.parity.calls.convolutions import align_convolutions, align_points
from icenet.parity.calls.events import Run
from icenet.parity.calls.matching import renamed_arrays
from icenet.parity.calls.mismatches import first_mismatch
from icenet.parity.calls.pairing import pair_calls, relative
from icenet.parity.calls.pairs import Pair
from icenet.parity.calls.runs import Draws, check_draws, run_training, with_equal_draws
from icenet.parity.calls.sides import ModuleError
from icenet.parity.calls.targets import AmbiguousAxes
from icenet.parity.causes.numbers import shape_numbers
from icenet.parity.causes.shapes import find_shapes
from icenet.parity.inputs import Inputs
from icenet.parity.results import status as states
from icenet.parity.results.result import Row, Stage
from icenet.parity.results.rows import is_within, split_at
from icenet.parity.stages import StageFailed, weights
from icenet.parity.state import Comparison
from icenet.parity.trace import output_name

Array = npt.NDArray[Any]


def _pair_parameters(c: Comparison) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """Returns the names of the arrays that both sides have, `a` to `b`, and those that one of them lacks.

    The latter are (path in `b`, name, side that has it).
    """
    shapes_a, shapes_b = c.a.shapes, c.b.shapes
    different = {
        match.b
        for match in c.matches
        if match.a is not None
        and match.b is not None
        and c.b.kinds.get(match.b) in align.DIFFERENT_CALLS
        and c.a.kinds.get(match.a) == c.b.kinds.get(match.b)
        and c.a.backend != c.b.backend
    } | c.opaque
    c.different = {path for path in different if path is not None}
    to_b = c.a.names
    to_a = set(to_b.values())
    names: dict[str, str] = {}
    one_sided: list[tuple[str, str, str]] = []
    renamed = renamed_arrays(c.a, c.b, c.options.get("rename"))
    for name in shapes_a:
        holder, rest = split_at(name, c.a.modules)
        if name in renamed and not is_within(split_at(renamed[name], c.b.modules)[0], different):
            names[name] = renamed[name]
            continue
        if holder not in to_b or is_within(to_b[holder], different):
            continue
        other = f"{to_b[holder]}.{rest}" if to_b[holder] else rest
        if other in shapes_b:
            names[name] = other
        else:
            one_sided.append((to_b[holder], rest, "a"))
    taken = set(names.values())
    for name in shapes_b:
        holder, rest = split_at(name, c.b.modules)
        if name not in taken and holder in to_a and not is_within(holder, different):
            one_sided.append((holder, rest, "b"))
    return names, one_sided


def compare_parameters(c: Comparison, stage: Stage, inputs: Inputs) -> None:
    """Compares which parameters there are, and their shapes; copies the weights of `b`, if they are to be copied."""
    c.parameter_names, one_sided = _pair_parameters(c)
    align_convolutions(c, inputs)
    align_points(c)
    trained = {"a": c.a.trainable_names, "b": c.b.trainable_names}
    for path, name, side in one_sided:
        whole = f"{path}.{name}" if path else name
        own = whole
        if side == "a":
            back = {theirs: ours for ours, theirs in c.a.names.items()}
            own = f"{back[path]}.{name}" if back[path] else name
        if own not in trained[side]:
            c.report.notes.append(f"{whole}: a buffer of {side} only")
            continue
        note = f"the parameter {name} exists in {side} only"
        stage.rows.append(Row(path, name, status=states.DIFFERS, ratio=math.inf, note=note))
        c.fail(stage, path, note=note)
    for ours, theirs in c.parameter_names.items():
        path, name = split_at(theirs, c.b.modules)
        shapes = c.a.shapes[ours], c.b.shapes[theirs]
        status, note = states.PASSED, ""
        if shapes[0] != shapes[1]:
            status, note = states.DIFFERS, f"{name} is {list(shapes[0])} in a, {list(shapes[1])} in b"
            c.fail(stage, path, note=note)
            c.report.cause = c.report.cause or _cause_of_shapes(c, path, ours, *shapes)
        stage.rows.append(Row(path, name, shapes[1], status, math.inf if note else 0.0, note=note))
    for path in c.b.modules:
        parts = _parts_of_recurrence(c, path)
        single = "the layer of a one of each" if path in c.different else _single_layers(c, path)
        if parts and single:
            note = f"b has {parts}, {single}"
            stage.rows.append(Row(path, "", status=states.DIFFERS, ratio=math.inf, note=note))
            c.fail(stage, path, note=note)
    if stage.status == states.FAILED:
        c.report.cause = c.report.cause or _cell_without_layer(c, c.report.culprit or "")
        if parts := _parts_of_recurrence(c, c.report.culprit or ""):
            name = c.report.culprit or "the model"
            c.report.cause = c.report.cause or ("" if parts in stage.note else f"{name} has {parts} in b")
            c.report.notes.append(
                f"{name}: b has {parts}. Such a layer is compared with a layer of mlx.nn for each "
                "layer and direction, except in a trace, or with a module of the same parameters (weight_ih_l0, "
                "weight_hh_l0 and so on, as icenet port writes)"
            )
        raise StageFailed
    weights.copy_weights(c, stage)


def _parts_of_recurrence(c: Comparison, path: str) -> str:
    """Returns how many layers and directions a recurrent layer of `b` has, or an empty text if it is one of each."""
    steps = [name for name in c.b.shapes if name.startswith(f"{path}.weight_hh_l" if path else "weight_hh_l")]
    if len(steps) < 2 or c.b.kinds.get(path) != "native_recurrent":
        return ""
    directions = 2 if any(name.endswith("_reverse") for name in steps) else 1
    layers = len(steps) // directions
    return f"{layers} layer{'s' * (layers > 1)} and {directions} direction{'s' * (directions > 1)}"


def _cell_without_layer(c: Comparison, path: str) -> str:
    """Returns why a cell of `b` is not compared with a recurrent layer of `a`; an empty text for other modules."""
    own, theirs = c.a.own_path(path), c.b.classes.get(path, "").rpartition(".")[2]
    is_layer = own is not None and c.a.classes[own].startswith("mlx.nn.layers.recurrent.")
    if not is_layer or theirs not in ("LSTMCell", "GRUCell", "RNNCell"):
        return ""
    return (
        f"a {theirs} with hooks or in a trace is compared only with a module of the same parameters (weight_ih, "
        "weight_hh and so on)"
    )


def _single_layers(c: Comparison, path: str) -> str:
    """Returns which layers of one direction `a` has in place of a recurrent layer of `b` that it lacks."""
    if path in c.a.names.values() or c.a.backend != "mlx":
        return ""
    own = c.b.classes[path].rpartition(".")[2]
    single = [p for p, name in c.a.classes.items() if name == f"mlx.nn.layers.recurrent.{own}" and p not in c.a.names]
    return f"a has {', '.join(single)} of one layer and direction" if single else ""


def _cause_of_shapes(c: Comparison, path: str, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Returns why the parameter `name` of `a` may have another shape than that of `b`, or an empty text."""
    holder, (own, leaf) = c.a.own_path(path), layout.split(name)
    if holder is not None and "Quantized" in c.a.classes[holder]:
        return "the layer is quantized in a, which rounds its weights: compare before mlx.nn.quantize is called"
    if _has_axes_of_torch(c, name, expected):
        return (
            f"{leaf} has the axes of PyTorch in a, where the layer of MLX has its channels last: "
            "icenet.from_torch moves them"
        )
    if shape == expected[::-1]:
        return f"{leaf} is transposed in a"
    if len(shape) > 2 and shape == (expected[0], *expected[2:], expected[1]):
        return (
            f"{leaf} has its channels last in a, first in b, and axes are moved for layers of mlx.nn only: "
            "use one, or keep the axes of b in a and move them in its call, "
            f"self.{leaf}.moveaxis(1, -1)"
        )
    if c.a.layer_kinds.get(own) == "linear" and layout.is_of_size_1(expected, shape):
        return (
            f"a Linear in a for a convolution of size 1 in b: use mlx.nn.Conv{len(expected) - 2}d"
            f"({shape[1]}, {shape[0]}, 1) with the stride and padding of b, whose weight has corresponding axes"
        )
    return ""


def _has_axes_of_torch(c: Comparison, name: str, expected: tuple[int, ...]) -> bool:
    """Returns whether a layer of MLX that has other axes than PyTorch's holds an array of a shape in PyTorch."""
    holder, leaf = layout.split(name)
    kind = c.a.layer_kinds.get(holder, "plain")
    if c.a.backend != "mlx" or "plain" in kind:
        return False
    rule, shape = layout.rule(kind, leaf).to_mlx, c.a.shapes[name]
    return rule is not None and len(rule) == len(shape) and tuple(shape[axis] for axis in rule) == expected


def compare_training_shapes(
    c: Comparison, stage: Stage, inputs: Inputs
) -> tuple[list[Pair], tuple[Run, Run, Run]] | None:
    """Runs all sides in training mode with the loss and its gradients, and compares the shapes.

    Returns:
        The calls and the runs; None if a side fails, draws random numbers, or the axes of its outputs are not known.
    """
    c.inputs_a = inputs
    with contextlib.suppress(AmbiguousAxes, ModuleError, Draws):
        return paired(c, stage, run_training(c, inputs, []), None)
    return None


def compare_shapes(c: Comparison, stage: Stage, inputs: Inputs) -> tuple[list[Pair], tuple[Run, Run, Run]]:
    """Runs all sides in evaluation mode, without gradients, and compares the shapes of all arguments and outputs."""
    try:
        (own, noise, exact), failure = evaluation_runs(c, inputs)
    except Draws as error:
        raise UsageError(f"compare: {error} in evaluation mode, so no two runs are equal; give it a key") from None
    except ModuleError as error:
        raise UsageError(
            f"compare: b ({c.report.names[1]}) fails on the inputs, in {error.path or 'the model itself'}: "
            f"{error.reason}; give {option('inputs, or layout=')} that it accepts"
        ) from error
    pairs, runs = paired(c, stage, (own, noise, exact), failure)
    if c.losses is None and not any(item.is_float for item in pairs[0].b.outputs):
        for name in ("loss", "gradients", "optimizer", "training"):
            c.stages[name].status, c.stages[name].note = states.SKIPPED, "b returns no floats, so there is no loss"
    return pairs, runs


def evaluation_runs(c: Comparison, inputs: Inputs) -> tuple[tuple[Run, Run, Run], ModuleError | None]:
    """Runs all sides in evaluation mode; returns the runs, and the error of `a`.

    Raises:
        Draws: Modules draw random numbers that are not equal.
        ModuleError: `b` fails.
    """
    c.inputs_a = inputs
    c.set_mode(False)
    return with_equal_draws(c, lambda: _forward_runs(c, inputs))


def _forward_runs(c: Comparison, inputs: Inputs) -> tuple[tuple[Run, Run, Run], ModuleError | None]:
    """Returns the runs of all sides, and the error of `a`; that of `b` is raised."""
    failure: ModuleError | None = None
    exact = c.reference_run(inputs)
    try:
        own = c.a.record(inputs.given, inputs.values, c.store)
    except ModuleError as error:
        failure, own = error, error.run
    noise = c.b.record(inputs.given, c.inputs_b, c.store)
    if failure is None:
        check_draws(c, inputs)
    return (own, noise, exact), failure


def paired(
    c: Comparison, stage: Stage, runs: tuple[Run, Run, Run], failure: ModuleError | None
) -> tuple[list[Pair], tuple[Run, Run, Run]]:
    """Returns the calls of both sides, if the shapes of their arrays correspond and `a` did not fail."""
    pairs, notes = pair_calls(c.a, c.b, runs, c.matches)
    c.add_notes(notes)
    if mismatch := first_mismatch(pairs):
        c.fail(stage, mismatch.path, mismatch.where, mismatch.note)
        numbers = shape_numbers(c, mismatch.child if mismatch.where else mismatch.path)
        c.report.cause = (
            f"{relative(mismatch.child, mismatch.path)}: {numbers}" if mismatch.where and numbers else numbers
        ) or find_shapes(c, runs, mismatch)
        row = Row(mismatch.path, "shape", status=states.DIFFERS, ratio=math.inf, note=mismatch.note)
        stage.rows.append(replace(row, where=mismatch.where))
        raise StageFailed
    if failure is not None:
        path = c.a.names.get(failure.path, failure.path)
        note, where = f"a raises an error: {failure.reason}", ""
        call = next((event for event in reversed(failure.run.events) if event.path == failure.path), None)
        if failure.is_outside and call is not None and call.parent is not None:  # its caller computes the ids
            caller = c.a.names.get(call.parent.path, call.parent.path)
            path, where = caller, f"before {relative(path, caller)}"
        stage.rows.append(Row(path, "call", status=states.DIFFERS, ratio=math.inf, note=note, where=where))
        c.fail(stage, path, where, note)
        raise StageFailed
    if not pairs[0].outputs:
        raise UsageError(
            f"compare: {c.report.names[1]} returns nothing that can be compared; return tensors, or tuples, "
            "lists, dicts or dataclasses of them"
        )
    for i, j, _ in pairs[0].outputs:
        ours, theirs = pairs[0].a.outputs[i], pairs[0].noise.outputs[j]
        if ours.is_float != theirs.is_float:
            part = output_name(j)
            note = f"{part} is {ours.dtype} in a, {theirs.dtype} in b"
            stage.rows.append(Row("", part, theirs.array.shape, states.DIFFERS, math.inf, note=note))
            c.fail(stage, "", note=note)
            raise StageFailed
        if ours.is_float and ours.dtype != theirs.dtype:
            label = pairs[0].b.output_label(j)
            c.add_notes([f"{label} is {ours.dtype} in a, {theirs.dtype} in b: values are compared, not the dtype"])
    for pair in pairs:  # the masks of a dropout depend on the axes of its input
        how = pair.arguments[0][2] if pair.arguments else align.SAME
        for side in (c.b, c.reference):
            side.set_channels(pair.path, how == align.MOVED)
        if how == align.MOVED:
            c.moved.add(pair.path)
        if how == align.SEQUENCE_FIRST:
            c.exchanged.add(pair.path)
            if not c.computes_reference and c.a.backend == "mlx":
                c.a.set_sequence_first(pair.a.path)
        if c.a.backend == c.b.backend and c.computes_reference:
            c.a.set_channels(pair.a.path, how == align.MOVED)
    return pairs, runs
