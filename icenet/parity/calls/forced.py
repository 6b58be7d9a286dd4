"""Runs of the reference, with their gradients, in which every module returns values of another run.

A value that is within rounding of the edge of a ReLU may be on the other side of it in `a`, and the gradients of the
run jump there. In these runs each function between two modules is differentiated at the values of `a`, or of the
reference. Nothing is left between both gradients but the jumps, and nothing between those at the values of `a` and
its own but the rounding of the backward pass. So one or two runs decide, in place of many nearby ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from icenet.parity import align
from icenet.parity.calls.events import Run
from icenet.parity.calls.pairs import Pair
from icenet.parity.calls.sides import Side
from icenet.parity.calls.structures import rebuild, take_apart
from icenet.parity.state import Comparison
from icenet.parity.trace import Value


def can_force(c: Comparison) -> bool:
    """Returns whether the reference can compute such runs: it is not recorded, and of PyTorch."""
    return c.computes_reference and c.b.backend == "torch"


def forced_run(c: Comparison, pairs: list[Pair], side: Side, of_a: bool = True) -> Run:
    """Returns the run of a side of `b`, with gradients, at the values of `a` or of the reference.

    Args:
        c, pairs: The comparison, and the calls of the runs of `a` and of the reference.
        side: `b` in the dtype under test, or the reference.
        of_a: Whether the modules return the values of `a`; otherwise those of the reference.
    """
    by_call = {(pair.path, pair.b.call): pair for pair in pairs}
    calls: dict[str, int] = {}

    def values_of(pair: Pair) -> dict[int, Any]:
        return {
            j: align.to_torch(how, pair.a.outputs[i].array) if of_a else pair.b.outputs[j].array
            for i, j, how in pair.outputs
            if j not in pair.masked_outputs and pair.b.outputs[j].is_float
        }

    def handle(path: str, call: Any, args: Any, kwargs: Any) -> Any:
        number = calls.get(path, 0)
        calls[path] = number + 1
        result, pair = call(*args, **kwargs), by_call.get((path, number))
        return result if pair is None else _forced(side, result, values_of(pair))

    loss = (c.losses or (None, None))[1]
    with side.tools.intercepting(side.modules, handle):
        return side.record(c.inputs_a.given, c.inputs_b, c.store, loss, c.targets_b, True, only_gradients=True)


def _forced(side: Side, result: Any, values: Mapping[int, Any]) -> Any:
    """Returns the result of a call with other values, whose gradients are passed on to those that it computed."""
    structure, arrays = take_apart(result, side.tools.ARRAY)
    for index, array in values.items():
        own = arrays[index]
        if tuple(own.shape) == array.shape and np.isfinite(array).all() and own.requires_grad:
            new = side.tools.native(Value(np.asarray(array), side.dtype), side.exact, side.module)
            arrays[index] = new + (own - own.detach())
    return rebuild(structure, arrays)
