"""Where a port differs from its original: the operation and the line; and the operations that draw random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.core.porting.build import Plan
from icenet.core.porting.build import plan as make_plan
from icenet.core.porting.record import Node, refs
from icenet.parity.ports.inputs import Arguments, arrays_of

_RANDOM = {
    *("rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm", "bernoulli", "normal"),
    *("uniform", "exponential", "multinomial", "rrelu", "rrelu_with_noise"),
}


def random_operations(plan: Plan) -> list[str]:
    """Returns the places of random operations other than dropout, which is switched off on both sides."""
    found = []
    for graph in (plan.graph, plan.train):
        for node in graph.nodes if graph is not None else ():
            if node.base.rstrip("_") in _RANDOM:
                found.append(str(node.place or node.name))
    return found


GROWTH = 32
"""By how many times an operation increases the relative error of all before it if it is another computation."""


def first_difference(plan: Plan, program: Any, module: Any, given: Arguments) -> str | None:
    """Returns the first operation of the evaluation mode whose value differs on some arguments, with its line.

    It is the one at which the error rises above that of rounding in the operations before it, relative to its result
    and its inputs, whose difference may be small. Without one, it is the first with an error of 1e-3.
    """
    before, sizes, large = 2.0**-22, dict[str, float](), None
    for node, ours, wanted in values_of(plan, program, module, given):
        if ours.shape != wanted.shape:
            return f"aten.{node.op} at {node.place}: shape {list(ours.shape)} instead of {list(wanted.shape)}"
        if wanted.size and wanted.dtype.kind in "fc":
            finite = np.isfinite(wanted)
            error = float(np.abs(ours - wanted)[finite].max(initial=0.0))
            sizes[node.name] = size = max(float(np.abs(wanted[finite]).max(initial=0.0)), 1e-6)
            if not error <= GROWTH * before * max(size, *(sizes.get(name, 0.0) for name in refs(node.args))):
                return f"aten.{node.op} at {node.place}"
            before = max(before, error / size)
            large = large or (f"aten.{node.op} at {node.place}" if error > 1e-3 * size else None)
        elif wanted.size and not (ours == wanted).all():
            return large or f"aten.{node.op} at {node.place}"
    return large


def values_of(
    plan: Plan, program: Any, module: Any, given: Arguments
) -> Iterator[tuple[Node, np.ndarray, np.ndarray]]:
    """Yields each operation of the evaluation mode with its value in the port and in the original, in their order."""
    run, load = backends.module("torch", "porting.run"), backends.module("mlx", "porting.load")
    traced = make_plan(plan.graph, None, False, "trace", trace=True)
    values = run.intermediate(program, *given)
    weights = traced.native(run.weights(module, program))
    found = load.trace(traced.source, traced.class_name, weights, arrays_of(given), traced.arguments)
    places = {node.name: node for node in plan.graph.nodes}
    for name, value in found.items():
        order = traced.orders.get(name)
        if order is not None:
            value = value.transpose(np.argsort(order))
        node = places.get(name)
        if name in values and node is not None and not node.mutates:
            yield node, value, values[name]


_EXACT = {
    *("floor_divide", "floor", "ceil", "round", "trunc", "fix", "sign", "sgn", "argmax", "argmin", "bucketize"),
    *("eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isfinite", "signbit", "heaviside", "searchsorted"),
    *("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"),
}
"""Operations that jump: a rounding of their inputs may change their result by a whole step, so that a comparison to
rounding says nothing. On equal inputs their results are equal."""


def jump_that_differs(plan: Plan, program: Any, module: Any, given: Arguments) -> str | None:
    """Returns the first operation that jumps and has another result than the original's on equal inputs."""
    if not any(_jumps(node) for node in plan.graph.nodes):
        return None
    equal: dict[str, np.ndarray] = {}
    arrays = {ref.name for ref in plan.graph.inputs} | set(plan.graph.arrays)
    for node, ours, wanted in values_of(plan, program, module, given):
        if ours.shape != wanted.shape:
            return None  # said where the outputs are compared
        same = (ours == wanted) | ((ours != ours) & (wanted != wanted))
        equal[node.name] = same
        if not _jumps(node):
            continue
        names = [name for name in refs(node.args) if name not in arrays]
        if any(name not in equal for name in names):
            continue
        inputs = [equal[name] for name in names]
        if all(item.all() for item in inputs):
            where = np.ones(same.shape, bool)
        elif node.base not in ("argmax", "argmin", "searchsorted") and all(
            item.shape in (same.shape, ()) for item in inputs
        ):
            where = np.logical_and.reduce([np.broadcast_to(item, same.shape) for item in inputs])
        else:
            continue
        if not same[where].all():
            return f"aten.{node.op} at {node.place}, on equal inputs"
    return None


def _jumps(node: Node) -> bool:
    return node.base in _EXACT or (node.base == "div" and node.args.get("rounding_mode") is not None)
