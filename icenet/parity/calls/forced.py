"""A run of the reference, with its gradients, in which every module returns what it returned in `a`.

A value that is within rounding of the edge of a ReLU may be on the other side of it in `a`, and the gradients of the
run jump there. In this run each function between two modules is differentiated at the values of `a`, so that nothing
is left between both but the rounding of the backward pass. One run decides, in place of many nearby ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from icenet.parity import align
from icenet.parity.calls.events import Run, rebuild, take_apart
from icenet.parity.calls.pairs import Pair
from icenet.parity.calls.sides import Side
from icenet.parity.state import Comparison
from icenet.parity.trace import Value


def forced_runs(c: Comparison, pairs: list[Pair]) -> tuple[Run, Run] | None:
    """Returns the runs of `b` and of the reference, with gradients, at the values of `a`.

    Args:
        c, pairs: The comparison, and the calls of the run of `a`.

    Returns:
        None if the reference cannot compute them: it is recorded, or of MLX.
    """
    if not c.computes_reference or c.b.backend != "torch":
        return None
    values = {
        (pair.path, pair.b.call): {
            j: align.to_torch(how, pair.a.outputs[i].array)
            for i, j, how in pair.outputs
            if j not in pair.masked_outputs and pair.b.outputs[j].is_float
        }
        for pair in pairs
    }
    loss = (c.losses or (None, None))[1]
    found = []
    for side in (c.b, c.reference):
        calls: dict[str, int] = {}

        def handle(
            path: str, call: Any, args: Any, kwargs: Any, side: Side = side, calls: dict[str, int] = calls
        ) -> Any:
            number = calls.get(path, 0)
            calls[path] = number + 1
            return _forced(side, call(*args, **kwargs), values.get((path, number), {}))

        with side.tools.intercepting(side.modules, handle):
            found.append(side.record(c.inputs_a.given, c.inputs_b, c.store, loss, c.targets_b, True))
    return found[0], found[1]


def _forced(side: Side, result: Any, values: Mapping[int, Any]) -> Any:
    """Returns the result of a call with other values, whose gradients are passed on to those that it computed."""
    structure, arrays = take_apart(result, side.tools.ARRAY)
    for index, array in values.items():
        own = arrays[index]
        if tuple(own.shape) == array.shape and np.isfinite(array).all() and own.requires_grad:
            new = side.tools.native(Value(np.asarray(array), side.dtype), side.exact, side.module)
            arrays[index] = new + (own - own.detach())
    return rebuild(structure, arrays)
