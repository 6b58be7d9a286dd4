"""The arguments of a port's class: it is tried with others, and refuses those with which it computes something else.

Methods have numbers that the original computes from its arguments and that no expression of a port replaces, such as
the 8 of `reshape(B, T, 4, 8)`.
"""

from __future__ import annotations

import ast
import warnings
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.core.messages import some
from icenet.core.models import modules, port_weights
from icenet.core.porting.build import Plan
from icenet.core.porting.source.lines import wrapped
from icenet.parity.ports.inputs import Arguments, arrays_of, with_arrays, with_sizes
from icenet.parity.trace import Value

_LARGEST = 2**24
"""Elements of the arrays of a module up to which its class is tried."""
_NOISE = 32
"""How far from the original in float64 a port may be, in units of the distance of the original in fp32."""
TRIED = 2
"""The other values of each argument that are tried."""


class OtherArguments:
    """Tries the class of a whole port with other arguments, each by itself, next to the original's class.

    Args:
        plan: The port, which takes and returns images as the original.
        module: The original.
        weights: The arrays of the original and the constants of its graph, by path.
        example: The arguments of the example.
    """

    def __init__(self, plan: Plan, module: Any, weights: dict[str, np.ndarray], example: Arguments) -> None:
        self.plan, self.module, self.weights, self.example = plan, module, weights, example
        self.torch, self.load = backends.module("torch", "porting.arguments"), backends.module("mlx", "porting.load")
        self.wrong: dict[str, Any] = {}
        """The arguments with which the port differs, with their defaults."""
        self.right: list[str] = []
        """The arguments with which it agrees."""
        self.untried: list[str] = []
        """The arguments that were not tried, because the original accepts none of the other values."""

    def try_all(self) -> None:
        """Tries each argument that the port has in common with the original, and fills `wrong` and `untried`."""
        defaults = _defaults(self.plan.source, self.plan.class_name)
        arguments = self.torch.arguments_of(self.module, defaults)
        common = {name: value for name, value in defaults.items() if name in (arguments or defaults)}
        if not common:
            return
        if arguments is None or not self._makes_the_same(arguments):
            self.untried = [*common]
            return
        made = self.load.run_source(self.plan.source, self.plan.class_name)
        for name, value in common.items():
            tried = 0
            for other in others(value):
                agrees = self._agrees(getattr(made, self.plan.class_name), arguments, name, other)
                if agrees is None:
                    continue
                tried += 1
                if not agrees:
                    self.wrong[name] = value
                if tried == TRIED or not agrees:
                    break
            if not tried:
                self.untried.append(name)
            elif name not in self.wrong:
                self.right.append(name)

    def _makes_the_same(self, arguments: dict[str, Any]) -> bool:
        """Returns whether the original's class makes the original of these arguments."""
        size = sum(array.size for array in self.weights.values())
        other = self.torch.made(self.module, arguments) if size <= _LARGEST else None
        if other is None or not self.torch.is_like(self.module, other):
            return False
        ours, theirs = (original_outputs(item, self.example, False) for item in (self.module, other))
        return ours is not None and theirs is not None and are_close(ours, theirs, theirs)

    def _agrees(self, kind: Any, arguments: dict[str, Any], name: str, value: Any) -> bool | None:
        """Returns whether the port computes what the original computes with another argument; None if it is none."""
        other = self.torch.made(self.module, {**arguments, name: value})
        if other is None:
            return None
        for given in self._inputs(arguments[name], value):
            single = original_outputs(other, given, False)
            exact = original_outputs(other, given, True) if single is not None else None
            if single is None or exact is None:
                continue
            try:
                model = kind(**{name: value})
                if has_old_rates(self.module, other, model):
                    return False
                self._copy(other, model)
                arrays = [_single(array) for array in arrays_of(given)]
                with self.load.mode(model, False):
                    found = self.load.run(model, arrays, self.plan.arguments)
            except Exception:  # whatever a source raises whose numbers do not fit
                return False
            return are_close({key: found[key] for key in found if key.startswith("output")}, single, exact)
        return None

    def _copy(self, other: Any, model: Any) -> None:
        """Gives a port the weights of its original, and the constants of the graph."""
        places = self.plan.places()
        port_weights.mark(model, places)
        modules.from_torch(other, model)
        constants = {place.name: self.weights[path] for path, place in places.items() if place.kind == "constant"}
        backends.module("mlx", "porting.weights").assign(model, constants)

    def _inputs(self, before: Any, value: Any) -> list[Arguments]:
        """Returns the example, and one whose sizes that are the argument are the other value."""
        if type(value) is not int:
            return [self.example]
        shapes = [self.plan.graph.tensors[ref.name].shape for ref in self.plan.graph.inputs]
        places = [(number, dim) for number, shape in enumerate(shapes) for dim, n in enumerate(shape) if n == before]
        return [self.example, *([with_sizes(self.example, dict.fromkeys(places, value))] if places else [])]

    def notes(self) -> list[str]:
        """Returns what a report says of the arguments."""
        found = []
        if self.wrong:
            found.append(
                f"{self.plan.class_name}: the methods have numbers that depend on {some(self.wrong, 8)}; "
                "another value is an error"
            )
        if self.untried:
            found.append(
                f"{self.plan.class_name}: not tried with other values of {some(self.untried, 8)}; compare a model "
                "that you make with them"
            )
        return found


def has_old_rates(module: Any, other: Any, model: Any) -> bool:
    """Returns whether a port has rates of dropout that the original has, but not with other arguments."""
    rates = backends.module("torch", "porting.arguments").dropout_rates
    old = {round(rate, 6) for rate in rates(module)} - {round(rate, 6) for rate in rates(other)}
    return bool(old & backends.module("mlx", "porting.instances").dropout_rates(model))


def refusing(source: str, kind: str, wrong: dict[str, list[Any]]) -> str:
    """Returns a source in which the constructor of a class refuses arguments.

    Args:
        source: The source.
        kind: The name of the class.
        wrong: The arguments, with the values of each instance, which stay allowed.
    """
    start = source.index(f"class {kind}(nn.Module):")
    call = "        super().__init__()\n"
    place = source.index(call, start) + len(call)
    return source[:place] + "".join(f"        {line}\n" for line in _check(wrong)) + source[place:]


def original_outputs(module: Any, given: Arguments, double: bool) -> dict[str, Value] | None:
    """Returns the outputs of an original in evaluation mode; None if it raises an error."""
    run = backends.module("torch", "porting.run")
    inputs = with_arrays(given, [_single(array) for array in arrays_of(given)])
    try:
        with run.without_dropout(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = run.Reference(module, double).run(*inputs, False)
    except Exception:  # whatever the code of a user raises
        return None
    return {name: value for name, value in values.items() if name.startswith("output")}


def _check(wrong: dict[str, list[Any]]) -> list[str]:
    """Returns the statements that refuse other values than those of the instances."""
    rows = list(dict.fromkeys(zip(*wrong.values(), strict=True)))
    if len(wrong) == 1:
        ((name, _),) = wrong.items()
        values = [repr(row[0]) for row in rows]
        outside = f"!= {values[0]}" if len(values) == 1 else f"not in ({', '.join(values)})"
        return [
            f"if {name} {outside}:",
            f'    raise ValueError(f"{name} is {{{name}}}; the port was made for {" or ".join(values)}")',
        ]
    texts = [", ".join(f"{name}={value!r}" for name, value in zip(wrong, row, strict=True)) for row in rows]
    outside = f"!= {rows[0]!r}" if len(rows) == 1 else f"not in {rows!r}"
    lines = wrapped(f"if ({', '.join(wrong)}) {outside}:", 0)
    return [*lines, *wrapped(f'raise ValueError("the port was made for {" or ".join(texts)}")', 4)]


def _defaults(source: str, class_name: str) -> dict[str, Any]:
    """Returns the arguments of a class that are numbers, with their defaults."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__" and item.args.defaults:
                    names = [argument.arg for argument in item.args.args[-len(item.args.defaults) :]]
                    pairs = zip(names, item.args.defaults, strict=True)
                    values = {name: _number(default) for name, default in pairs}
                    return {name: value for name, value in values.items() if value is not None}
    return {}


def _number(node: ast.expr) -> Any:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return value if type(value) in (bool, int, float) else None


def others(value: Any) -> list[Any]:
    """Returns other values of an argument, those first that a constructor accepts more likely."""
    if type(value) is bool:
        return [not value]
    if type(value) is float:  # one that is small, such as an epsilon, shows its effect if it is large
        return [value * 1.5, value / 2] if abs(value) >= 0.05 else [0.5, 0.1]
    near = [value + 1, value - 1, value + 2]
    found = near if value > 4096 else [2 * value, value // 2, *near, 3 * value]
    return [item for item in dict.fromkeys(found) if item != value and (item > 1 or value <= 0)]  # 1 may be special


def _single(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float64 else array


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
