"""What the trials of a port's classes with other arguments share: the modules, the values, and the comparison."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.core.porting.build import Plan
from icenet.parity.ports.inputs import Arguments, arrays_of, with_arrays, with_sizes
from icenet.parity.trace import Value

_NOISE = 32
"""How far from the original in float64 a port may be, in units of the distance of the original in fp32."""
TRIED = 2
"""The other values of each argument that are tried."""


class ArgumentTrials:
    """Classes of a port that are tried with other arguments, each by itself, next to the original's classes.

    Args:
        plan: The port, which takes and returns images as the original.
        module: The original.
        weights: The arrays of the original and the constants of its graph, by path.
        example: The arguments of the example.
    """

    def __init__(self, plan: Plan, module: Any, weights: dict[str, np.ndarray], example: Arguments) -> None:
        self.plan, self.module, self.weights, self.example = plan, module, weights, example
        self.torch, self.load = backends.module("torch", "porting.arguments"), backends.module("mlx", "porting.load")


def others(value: Any) -> list[Any]:
    """Returns other values of an argument, those first that a constructor accepts more likely."""
    if type(value) is bool:
        return [not value]
    if type(value) is float:  # one that is small, such as an epsilon, shows its effect if it is large
        return [value * 1.5, value / 2] if abs(value) >= 0.05 else [0.5, 0.1]
    near = [value + 1, value - 1, value + 2]
    found = near if value > 4096 else [2 * value, value // 2, *near, 3 * value]
    return [item for item in dict.fromkeys(found) if item != value and (item > 1 or value <= 0)]  # 1 may be special


def given_for(value: Any, before: Any, call: Arguments, shapes: Iterable[Sequence[Any]]) -> list[Arguments]:
    """Returns the arguments of a call, and some whose sizes that are an argument have its other value.

    Args:
        value, before: The other value of the argument of a constructor, and its present one.
        call: The arguments of the call.
        shapes: The shape of each array of the call, with names in the place of open sizes.
    """
    if type(value) is not int:
        return [call]
    places = [
        (number, dim) for number, shape in enumerate(shapes) for dim, size in enumerate(shape) if size == before
    ]
    return [call, *([with_sizes(call, dict.fromkeys(places, value))] if places else [])]


def single_arrays(given: Any) -> list[np.ndarray]:
    """Returns the arrays of arguments, those of float64 as float32."""
    return [array.astype(np.float32) if array.dtype == np.float64 else array for array in arrays_of(given)]


def original_outputs(module: Any, given: Arguments, double: bool) -> dict[str, Value] | None:
    """Returns the outputs of an original in evaluation mode; None if it raises an error."""
    run = backends.module("torch", "porting.run")
    inputs = with_arrays(given, single_arrays(given))
    try:
        with run.without_dropout(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = run.Reference(module, double).run(*inputs, False)
    except Exception:  # whatever the code of a user raises
        return None
    return {name: value for name, value in values.items() if name.startswith("output")}


def are_close(ours: dict[str, Value], single: dict[str, Value], exact: dict[str, Value]) -> bool:
    """Returns whether outputs are equal but for rounding."""
    if ours.keys() != exact.keys():
        return False
    for name, value in exact.items():
        found, theirs, reference = ours[name].array, single[name].array, value.array
        if found.shape != reference.shape:
            return False
        if reference.dtype.kind not in "fc":
            if not np.array_equal(found, reference):
                return False
            continue
        finite = np.isfinite(theirs)
        if not np.array_equal(np.isfinite(found), finite):
            return False
        if not finite.any():
            continue
        distance = np.abs(found[finite] - reference[finite]).max()
        noise = np.abs(theirs[finite] - reference[finite]).max()
        if distance > max(_NOISE * noise, 4e-6 * np.abs(reference[finite]).max()):
            return False
    return True


def has_old_rates(module: Any, other: Any, model: Any) -> bool:
    """Returns whether a port has rates of dropout that the original has, but not with other arguments."""
    rates = backends.module("torch", "porting.arguments").dropout_rates
    old = {round(rate, 6) for rate in rates(module)} - {round(rate, 6) for rate in rates(other)}
    return bool(old & backends.module("mlx", "porting.instances").dropout_rates(model))
