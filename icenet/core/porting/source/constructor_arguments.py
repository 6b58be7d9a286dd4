"""What the arguments of an original's constructor must have been: numbers that it gives to layers and attributes."""

from __future__ import annotations

import ast
import math
from typing import Any

from icenet.core.porting.source.constructor_syntax import alternatives, is_loop_variable, key_of
from icenet.core.porting.source.constructor_values import Unknown, Values, number


class Evidence:
    """The numbers that are known of a constructor.

    Args:
        candidates: The expressions that the original may have in the place of a number, by its place.
        numbers: The numbers of the instances, by place.
        unsure: The places where the original calls something unknown.
    """

    def __init__(
        self,
        candidates: dict[int, list[ast.expr]],
        numbers: dict[int, tuple[str, ...]],
        unsure: set[int],
    ) -> None:
        self.candidates, self.numbers, self.unsure = candidates, numbers, unsure

    def find_arguments(self, values: Values) -> None:
        """Notes in `values` what each argument must have been, and which expressions variables have."""
        found = self.noted(values)
        original = values.original
        values.known = {key: found[key] for key in found if key in original.parameters or "." in key}
        for key in found.keys() - values.known.keys():
            variable = original.variable(key)
            column = tuple(map(repr, found[key]))
            chosen = values.only(values.branches(variable), column) if variable is not None else None
            if chosen is not None:
                values.chosen[key] = chosen
            else:
                values.known[key] = found[key]
        for key in [*values.known]:  # in `dim = dim * 2` the value is not that of the argument
            if not all(_keeps(values, key, value) for value in original.assigned.get(key, [])):
                del values.known[key]
        self.find_factors(values)

    def noted(self, values: Values) -> dict[str, list[Any]]:
        """Returns the values of the arguments and variables that are attributes or numbers of layers as they are."""
        original = values.original
        notes = _Notes(values)
        for name, expressions in original.attributes.items():
            key = key_of(expressions[0]) if len(expressions) == 1 else ""
            numbers = [item.get(name) for item in values.settings]
            if key and not key.startswith("self.") and all(type(item) in (int, float, bool) for item in numbers):
                notes.add(key, numbers)
        for place, expressions in self.candidates.items():
            for key in {key_of(expression) for expression in expressions} - {""}:
                if len(expressions) == 1 and place not in self.unsure:
                    notes.add(key, [number(text) for text in self.numbers[place]])
        notes.add_defaults()
        return {
            key: numbers
            for key, numbers in notes.found.items()
            if key not in notes.wrong and None not in numbers and not is_loop_variable(original, key)
            if all(math.isfinite(value) for value in numbers)  # "inf" is no source
        }

    def find_factors(self, values: Values) -> None:
        """Notes arguments of which only a product with a known number is known: x in `x * self.expansion`."""
        for place, expressions in self.candidates.items():
            product = expressions[0]
            if len(expressions) == 1 and isinstance(product, ast.BinOp) and isinstance(product.op, ast.Mult):
                for one, other in ((product.left, product.right), (product.right, product.left)):
                    self.find_factor(values, key_of(one), other, [number(text) for text in self.numbers[place]])

    @staticmethod
    def find_factor(values: Values, key: str, other: ast.expr, products: list[Any]) -> None:
        """Notes an argument by its products with another expression."""
        original = values.original
        if key not in original.parameters or key in values.known or key in original.assigned:
            return
        try:
            factors = [values.of(other, row) for row in range(len(products))]
        except Unknown:
            return
        pairs = [*zip(products, factors, strict=True)]
        if all(type(a) is int and type(b) is int and b and a % b == 0 for a, b in pairs):
            values.known[key] = [a // b for a, b in pairs]


class _Notes:
    """The numbers of arguments and variables. What has two that differ is wrong."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self.found: dict[str, list[Any]] = {}
        self.wrong: set[str] = set()

    def add(self, key: str, numbers: list[Any]) -> None:
        key = self.values.original.source_of(key)
        before = self.found.setdefault(key, [None] * len(numbers))
        for row, value in enumerate(numbers):
            if value is not None and before[row] is not None and repr(before[row]) != repr(value):
                self.wrong.add(key)
            before[row] = value if before[row] is None else before[row]

    def add_defaults(self) -> None:
        """Notes the defaults of arguments of which nothing else is known."""
        count = len(self.values.settings)
        for name, default in self.values.original.defaults.items():
            is_number = isinstance(default, ast.Constant) and type(default.value) in (int, float)
            if is_number and all(value is None for value in self.found.get(name, [None] * count)):
                self.found[name] = [ast.literal_eval(default)] * count
                self.values.assumed.add(name)


def _keeps(values: Values, key: str, value: ast.expr) -> bool:
    """Returns whether an argument to which the constructor gives a value keeps the one that is known."""
    column = tuple(map(repr, values.known[key]))
    inner = [item for item in alternatives(value) if key_of(item) != key]
    reading = [item for item in inner if any(key_of(node) == key for node in ast.walk(item))]
    return key not in values.original.parameters or all(values.agrees(item, column) for item in reading)
