"""The proof of a port: it computes what the PyTorch module computes, to rounding.

Outputs, gradients and the buffers after the call are judged by the criterion of all comparisons in IceNet
(`icenet.parity.yardstick`): the reference is the module in float64, the noise is the module in fp32, and a value over
the tolerance is judged again in nearby problems, in which a wrong computation is wrong each time. So are integers.
The results of operations that jump are equal on equal inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.core.errors import PortError
from icenet.core.porting.build import Plan
from icenet.parity.ports import places as proof_places
from icenet.parity.ports.inputs import Arguments, arrays_of, other_sizes, sizes_text, with_sizes
from icenet.parity.ports.limits import MOST, Guard, find_limits
from icenet.parity.ports.pair import OriginalFails, Pair, mode_name
from icenet.parity.ports.remainders import with_remainders
from icenet.parity.ports.report import Check, PortReport, limit_text, settle


def prove(
    plan: Plan,
    model: Any,
    module: Any,
    program: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    progress: Callable[[str], None] = lambda stage: None,
    accelerated: Any = None,
) -> PortReport:
    """Compares a port with its original, in both modes, on inputs of several sizes.

    On the example, outputs, gradients and buffers are compared; on the others, outputs. The port as IceNet runs it,
    with its own operations in some layers, is compared on the example, too.

    Args:
        plan: The source of the port and the records of the graph.
        model: The `mlx.nn.Module`.
        module: The `torch.nn.Module`.
        program: The exported program, whose guards say which sizes are possible.
        args, kwargs: The example: numpy arrays and constants.
        progress: Called with the name of each stage.
        accelerated: The port with IceNet's operations; None if it has no layer with them.
    """
    run = backends.module("torch", "porting.run")
    report = PortReport()
    example = args, kwargs
    exact, single = run.Reference(module, True), run.Reference(module, False)

    def accepts(given: Arguments) -> bool:
        is_one = any(array.shape[:1] == (1,) for array in arrays_of(given))
        if is_one or plan.graph.loops:  # an export has no batch of 1, and the steps of the example
            return _runs(single, given)
        accepted: bool = run.accepts(program, *given)
        return accepted

    others = other_sizes(plan, example, accepts)
    ones: list[Guard] = []
    random_places = proof_places.random_operations(plan)
    for training in (False, True):
        mode = mode_name(training)
        if training and plan.train is None:
            report.notes.append("the training mode cannot be exported and was not compared")
            continue
        if training and random_places:
            report.notes.append(f"random operations were not compared in training mode: {random_places[0]}")
            continue
        for given in (example, *others[:1]) if training else (example, *others):
            progress(f"comparing, {mode}")
            try:
                pair = Pair(plan, model, exact, single, given, training)
                if of_one := _places_of_one(example, given):
                    agreed = _agreed(pair)
                    report.checks += agreed
                    if not agreed:
                        ones.append(Guard("size >= 2", {"size": of_one}))  # an export takes no size for 1
                    continue
                own, notes = (accelerated, report.notes) if given is example else (None, [])
                # a later turn of a loop may have another gradient alone, as with `if t % 16 == 0: h = h.detach()`
                with_gradients = given is example or (bool(plan.graph.loops) and not training)
                report.checks += pair.checks(with_gradients, notes, own)
                report.is_empty |= pair.is_empty
                settle(report)
            except OriginalFails as error:
                if given is example and not training:
                    raise
                report.notes.append(f"not compared: {error}")
        if not training and report.passed:
            progress("comparing, other sizes")
            guards = [*ones, *_of_one_step(plan), *(Guard(*guard) for guard in run.guards(program))]
            _try_limits(plan, model, exact, single, example, report, guards)
            _try_fixed_sizes(plan, model, exact, single, example, report)
            if len({check.sizes for check in report.checks}) == 1:
                report.notes.append("compared on the sizes of the example only: the module or the port has no others")
            if place := proof_places.jump_that_differs(plan, program, module, example):
                report.checks.append(Check(mode, sizes_text(example), "jumps", np.inf, np.inf, place, "not equal"))
    return report


def _places_of_one(example: Arguments, given: Arguments) -> tuple[tuple[int, int], ...]:
    """Returns the places, as (number of the input, dimension), at which some inputs have a size of 1."""
    shapes = [(old.shape, new.shape) for old, new in zip(arrays_of(example), arrays_of(given), strict=True)]
    return tuple(
        (number, dim)
        for number, (old, new) in enumerate(shapes)
        for dim in range(len(new))
        if new[dim] == 1 < old[dim]
    )


def _of_one_step(plan: Plan) -> list[Guard]:
    """Returns the conditions that the sizes of loops are not 1, which an export does not try."""
    shapes = [plan.graph.tensors[ref.name].shape for ref in plan.graph.inputs]
    found = []
    for symbol in dict.fromkeys(symbol for loop in plan.graph.loops for symbol in loop.symbols()):
        places = [(number, dim) for number, shape in enumerate(shapes) for dim, n in enumerate(shape) if n == symbol]
        if places:
            found.append(Guard("size >= 2", {"size": tuple(places)}))
    return found


def _agreed(pair: Pair) -> list[Check]:
    """Returns the comparison at another size; none if the port fails or differs.

    Gradients are compared if they may depend on a size alone, as in `(x - x * scale).detach() + x * scale`.
    """
    try:
        checks = pair.checks(any(node.base == "detach" for node in pair.plan.graph.nodes), [])
    except PortError:
        return []
    return checks if all(check.passed for check in checks) else []


def _runs(single: Any, given: Arguments) -> bool:
    """Returns whether the original takes some arguments."""
    try:
        single.run(*given, False)
    except Exception:  # whatever the code of a user raises
        return False
    return True


_LARGEST = 2**20
"""Elements of inputs that are tried only because a module may take some sizes alone."""


def _try_fixed_sizes(plan: Plan, model: Any, exact: Any, single: Any, example: Arguments, report: PortReport) -> None:
    """Tries other sizes in the dimensions that the graph has fixed, and compares what both serve.

    Most are fixed by the weights, and the original has no other size either. A dimension at which the original
    returns something and the port fails, or returns another thing, is written to the report.
    """
    tensors = [plan.graph.tensors[ref.name] for ref in plan.graph.inputs]
    same: dict[int, list[tuple[int, int]]] = {}
    for number, tensor in enumerate(tensors):
        for dim, size in enumerate(tensor.shape):
            if isinstance(size, int) and size:
                same.setdefault(size, []).append((number, dim))
    for size, places in same.items():
        tries = [places, *([place] for place in places)] if len(places) > 1 else [places]
        shapes = [array.shape for array in arrays_of(example)]
        equal = [(number, dim) for number, shape in enumerate(shapes) for dim, n in enumerate(shape) if n == size]
        if len(equal) > len(places):  # others of this size are open, and the module may need equal ones
            tries.append(equal)
        for chosen in tries:
            near = with_sizes(example, dict.fromkeys(chosen, size + (32 if size % 32 == 0 else 1)))
            far = with_sizes(example, dict.fromkeys(chosen, 4 * size))  # of which an integer can be the square root
            tries_of = (near, far) if sum(array.size for array in arrays_of(far)) <= _LARGEST else (near,)
            larger = next((item for item in tries_of if _runs(single, item)), None)
            # a loop may run over the first elements of a list of layers
            less = with_sizes(example, dict.fromkeys(chosen, max(size // 2, 2)))
            tried = [larger] if larger is not None else []
            tried += [less] if size > 2 and _runs(single, less) else []
            if not tried:  # the module does not have this size
                continue
            agreed = [_agreed(Pair(plan, model, exact, single, given, False)) for given in tried]
            if all(agreed):
                report.checks += [check for checks in agreed for check in checks]
                continue  # all at once; each alone may differ, as a source may read the width from the height
            for number, dim in set(chosen) & set(places):
                report.fixed.setdefault(plan.graph.inputs[number].name, {})[dim] = size
            if len(chosen) > 1:
                break
    for name, sizes in report.fixed.items():
        text = ", ".join(f"{size} in dimension {dim}" for dim, size in sorted(sizes.items()))
        report.notes.append(f"{name} has a fixed size, {text}; the port does not serve another one")


def _try_limits(
    plan: Plan,
    model: Any,
    exact: Any,
    single: Any,
    example: Arguments,
    report: PortReport,
    guards: list[Guard],
) -> None:
    """Tries sizes that violate the guards of the graph; those at which the port differs are in the report."""

    def serves(given: Arguments) -> bool:
        return bool(_agreed(Pair(plan, model, exact, single, given, False)))

    names = [ref.name for ref in plan.graph.inputs]
    found = find_limits(example, guards, functools.partial(_runs, single), serves)
    if found.untried:
        report.notes.append(
            f"{found.untried} conditions of the export on sizes were not tried, since {MOST} inputs were; "
            "compare other sizes with the module before use"
        )
    found = with_remainders(found, [array.shape for array in arrays_of(example)])
    for (number, dim), (low, high) in sorted(found.ranges.items()):
        if low is not None and low == high:
            report.fixed.setdefault(names[number], {})[dim] = low
        else:
            report.limits.setdefault(names[number], {})[dim] = [low, high]
    report.guards = found.guards
    texts = [
        f"{name} has {', '.join(f'{limit_text(*limit)} in dimension {dim}' for dim, limit in sorted(sizes.items()))}"
        for name, sizes in report.limits.items()
    ]
    texts += [guard.texts(lambda place: f"{names[place[0]]}.shape[{place[1]}]")[0] for guard in found.guards]
    report.notes += [f"{text}; beyond, the port computes something else than the module" for text in texts]


def locate(plan: Plan, program: Any, module: Any, given: Arguments, report: PortReport) -> str:
    """Returns what differs: the first operation, with the original's line, or the value that the report found.

    The operations of the evaluation mode are compared, on the example.
    """
    bad = [check for check in report.checks if not check.passed]
    worst = max(bad, key=lambda check: check.ratio)
    if worst.what == "jumps":
        return worst.name
    kind = {"outputs": "output", "gradients": "gradient of", "buffers": "buffer"}[worst.what]
    how = worst.note or f"{worst.ratio:.2g} times the noise of rounding"
    found = f"{kind} {worst.name.removeprefix('output ')} in {worst.mode} mode on {worst.sizes}, {how}"
    if all(check.layers == "icenet" for check in bad):
        return f"{found}, with IceNet's layers; with those of MLX the port computes what the module computes"
    if not any(check.mode == "evaluation" and check.what == "outputs" for check in bad):
        return found
    return proof_places.first_difference(plan, program, module, given) or found
