"""The arguments of a port's class: it is tried with others, and refuses those with which it computes something else.

Methods have numbers that the original computes from its arguments and that no expression of a port replaces, such as
the 8 of `reshape(B, T, 4, 8)`.
"""

from __future__ import annotations

import ast
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.core.messages import some
from icenet.core.models import modules, port_weights
from icenet.core.porting.build import Plan
from icenet.core.porting.source.lines import wrapped
from icenet.parity.ports.inputs import Arguments
from icenet.parity.ports.trials import (
    TRIED,
    ArgumentTrials,
    are_close,
    given_for,
    has_old_rates,
    original_outputs,
    others,
    single_arrays,
)

_LARGEST = 2**24
"""Elements of the arrays of a module up to which its class is tried."""


class OtherArguments(ArgumentTrials):
    """Tries the class of a whole port; see `ArgumentTrials`."""

    def __init__(self, plan: Plan, module: Any, weights: dict[str, np.ndarray], example: Arguments) -> None:
        super().__init__(plan, module, weights, example)
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
        shapes = [self.plan.graph.tensors[ref.name].shape for ref in self.plan.graph.inputs]
        for given in given_for(value, arguments[name], self.example, shapes):
            single = original_outputs(other, given, False)
            exact = original_outputs(other, given, True) if single is not None else None
            if single is None or exact is None:
                continue
            try:
                model = kind(**{name: value})
                if has_old_rates(self.module, other, model):
                    return False
                self._copy(other, model)
                arrays = single_arrays(given)
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
