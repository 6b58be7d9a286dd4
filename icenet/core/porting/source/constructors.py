"""The arguments of constructors: those of the original, where its source says which numbers they give to layers."""

from __future__ import annotations

import ast
import copy
import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from icenet.core.porting.record import Constructor
from icenet.core.porting.source.constructor_syntax import (
    Original,
    alternatives,
    is_loop_variable,
    key_of,
    original_at,
)
from icenet.core.porting.source.instances import Instance
from icenet.core.porting.source.lines import RESERVED
from icenet.core.porting.source.structure import METHODS

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_CALLS: dict[str, Callable[..., Any]] = {"int": int, "max": max, "min": min, "round": round, "math.sqrt": math.sqrt}
_DEEPEST = 6
"""How many variables lead from a number to an argument."""


class _Unknown(Exception):
    """An expression has no value that is known."""


@dataclass
class Signature:
    """The arguments of a generated class: each is an argument of the original's constructor or a part of one.

    Attributes:
        original: The constructor.
        keys: What each argument is in it, such as "dim" or "config.hidden_size", by its name.
    """

    original: Original
    keys: dict[str, str] = field(default_factory=dict)


@dataclass
class Solution:
    """The numbers of a constructor as expressions of its arguments.

    Attributes:
        expressions: The source in the place of a number, by its place.
        arguments: The values of each argument, one for each instance, by name.
        defaults: The arguments that have a default in the original which no instance differs from.
        attributes: The source of attributes that methods or other statements read, by name.
        statements: The statements that set these attributes, and variables of the constructor.
        signature: The arguments, for classes that make such instances.
        keys: What each argument is in the original, by name.
    """

    expressions: dict[int, str] = field(default_factory=dict)
    arguments: dict[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    statements: list[str] = field(default_factory=list)
    signature: Signature | None = None
    keys: dict[str, str] = field(default_factory=dict)


class Constructors:
    """The constructors of the original, and the arguments of the classes that were made of them.

    Args:
        places: Where the original makes each instance, None where that is not known.
        layers: Where the classes that become a layer make it, by name and place.
    """

    def __init__(self, places: Iterable[Constructor | None], layers: Iterable[tuple[str, Constructor]] = ()) -> None:
        known = {(item.file, item.line) for item in places if item is not None}
        self.originals = [item for item in (original_at(*place) for place in sorted(known)) if item is not None]
        self.signatures: dict[str, Signature] = {}
        found: dict[str, list[Original | None]] = {}
        for name, file, line in {(name, item.file, item.line) for name, item in layers}:
            found.setdefault(name, []).append(original_at(file, line))
        self.layers = {name: items[0] if len(items) == 1 else None for name, items in found.items()}

    def solved(
        self,
        name: str,
        instance: Instance,
        lines: list[str],
        columns: dict[tuple[int, int], tuple[int, tuple[str, ...]]],
        settings: list[dict[str, Any]],
        wanted: Iterable[str],
    ) -> Solution:
        """Returns the numbers of a constructor as the original has them.

        Args:
            name: The name of the class.
            instance: One of its instances.
            lines: The statements of the constructor that is to be written.
            columns: For the line and column of each number: its place, and its value in each instance.
            settings: The attributes of each instance in the original that are numbers.
            wanted: The attributes that methods read.
        """
        constructor = instance.constructor
        original = original_at(constructor.file, constructor.line) if constructor is not None else None
        if constructor is None or original is None:
            return Solution()
        candidates: dict[int, list[ast.expr]] = {}
        unsure = set()
        for row, line in enumerate(lines):
            for column, expression, is_sure in original.pairs(line, self.signatures, self.layers):
                if (row, column) in columns:
                    place = columns[row, column][0]
                    candidates.setdefault(place, []).append(expression)
                    unsure |= {place} if not is_sure else set()
        numbers = dict(columns.values())
        solver = _Solver(original, dict(constructor.constants), candidates, numbers, settings, unsure)

        def given(number: int, parameter: str) -> bool:
            return any(item.gives(instance.name, number, parameter) for item in self.originals)

        solution = solver.solution(wanted, given)
        if solution.signature is not None and solution.arguments:
            self.signatures[name] = solution.signature
        return solution


class _Solver:
    def __init__(
        self,
        original: Original,
        constants: dict[str, Any],
        candidates: dict[int, list[ast.expr]],
        numbers: dict[int, tuple[str, ...]],
        settings: list[dict[str, Any]],
        unsure: set[int],
    ) -> None:
        self.original, self.constants, self.candidates = original, constants, candidates
        self.numbers, self.settings, self.unsure = numbers, settings, unsure
        self.assumed: set[str] = set()
        """The arguments of which only the default is known. An instance may have been given another value."""
        self.known: dict[str, list[Any]] = {}
        """The values of arguments and their parts, one for each instance."""
        self.names: dict[str, str] = {}
        """The names of arguments by what they are in the original."""
        self.result, self.signature = Solution(), Signature(original)
        self.is_set: set[str] = set()
        self.chosen: dict[str, ast.expr] = {}
        """The expressions of variables of which the original has several, `b` in `a or b`."""
        self.open: set[str] = set()
        """The attributes whose expressions are being written."""

    def solution(self, wanted: Iterable[str], given: Callable[[int, str], bool]) -> Solution:
        """Returns the expressions of the numbers, and those of attributes that methods read."""
        self.find_arguments()
        for place in sorted(self.candidates):
            column = self.numbers[place]
            if set(column) <= {"True", "False"} and len(set(column)) == 1:
                continue
            expression = self.only(
                [inner for item in self.candidates[place] for inner in self.branches(item)], column
            )
            default = self.original.defaults.get(key_of(expression)) if expression is not None else None
            if default is not None and {ast.unparse(default)} == {*column} <= {"0", "1", "0.0"}:
                continue  # such as the padding 1 of a convolution whose dilation is 1
            text = self.written(expression) if expression is not None else None
            if text is not None:
                self.result.expressions[place] = text
        for name in wanted:
            self.attribute(name)
        order = {name: index for index, name in enumerate(self.original.parameters)}
        keys = sorted(self.names, key=lambda key: order.get(key.partition(".")[0], len(order)))
        for key in keys:
            name, values = self.names[key], tuple(map(_text, self.known[key]))
            default = self.original.defaults.get(key)
            is_default = default is not None and {*values} == {_text(_number(ast.unparse(default)))}
            if is_default and not given(order[key], key):
                self.result.defaults[name] = values[0]
            else:
                self.signature.keys[name] = key
            self.result.arguments[name] = values
            self.result.keys[name] = key
        self.result.signature = self.signature
        return self.result

    def find_arguments(self) -> None:
        """Notes what each argument must have been: a number that the constructor gives to a layer as it is."""
        found: dict[str, list[Any]] = {}
        wrong: set[str] = set()

        def note(key: str, values: list[Any]) -> None:
            key = self.original.source_of(key)
            before = found.setdefault(key, [None] * len(values))
            for row, value in enumerate(values):
                if value is not None and before[row] is not None and repr(before[row]) != repr(value):
                    wrong.add(key)
                before[row] = value if before[row] is None else before[row]

        for name, expressions in self.original.attributes.items():
            key = key_of(expressions[0]) if len(expressions) == 1 else ""
            values = [item.get(name) for item in self.settings]
            if key and not key.startswith("self.") and all(type(value) in (int, float, bool) for value in values):
                note(key, values)
        for place, expressions in self.candidates.items():
            for key in {key_of(expression) for expression in expressions} - {""}:
                if len(expressions) == 1 and place not in self.unsure:
                    note(key, [_number(text) for text in self.numbers[place]])
        for name, default in self.original.defaults.items():
            if isinstance(default, ast.Constant) and type(default.value) in (int, float):
                before = found.get(name, [None] * len(self.settings))
                if all(value is None for value in before):
                    found[name] = [default.value] * len(self.settings)
                    self.assumed.add(name)
        found = {
            key: values
            for key, values in found.items()
            if key not in wrong and None not in values and not is_loop_variable(self.original, key)
            if all(math.isfinite(value) for value in values)  # "inf" is no source
        }
        self.known = {key: found[key] for key in found if key in self.original.parameters or "." in key}
        for key in found.keys() - self.known.keys():
            variable = self.original.variable(key)
            column = tuple(map(repr, found[key]))
            chosen = self.only(self.branches(variable), column) if variable is not None else None
            if chosen is not None:
                self.chosen[key] = chosen
            else:
                self.known[key] = found[key]
        for key in [*self.known]:  # in `dim = dim * 2` the value is not that of the argument
            if not all(self.keeps(key, value) for value in self.original.assigned.get(key, [])):
                del self.known[key]
        self.find_factors()

    def keeps(self, key: str, value: ast.expr) -> bool:
        """Returns whether an argument to which the constructor gives a value keeps the one that is known."""
        column = tuple(map(repr, self.known[key]))
        inner = [item for item in alternatives(value) if key_of(item) != key]
        reading = [item for item in inner if any(key_of(node) == key for node in ast.walk(item))]
        return key not in self.original.parameters or all(self.agrees(item, column) for item in reading)

    def branches(self, node: ast.expr) -> list[ast.expr]:
        """Returns the expressions of which a value is one, without those that known arguments exclude."""
        if (
            isinstance(node, ast.IfExp)
            and isinstance(node.test, ast.Compare)
            and key_of(node.test.left) in self.known
        ):
            is_none = ast.unparse(node.test).endswith(" is None")
            if is_none or ast.unparse(node.test).endswith(" is not None"):
                return self.branches(node.orelse if is_none else node.body)
        if isinstance(node, ast.BoolOp) and all(self.known.get(key_of(node.values[0]), [0])):
            return [node.values[0]] if isinstance(node.op, ast.Or) else alternatives(node)
        return alternatives(node)

    def only(self, expressions: list[ast.expr], column: tuple[str, ...]) -> ast.expr | None:
        """Returns the expression with the numbers of a column, None if there is none or several that differ."""
        agreeing = {
            ast.unparse(item): item
            for item in expressions
            if any(key_of(node) for node in ast.walk(item)) and self.agrees(item, column)
        }
        texts = {self.original.source_of(text) for text in agreeing}
        return next(iter(agreeing.values())) if len(texts) == 1 else None

    def find_factors(self) -> None:
        """Notes arguments of which only a product with a known number is known: x in `x * self.expansion`."""
        for place, expressions in self.candidates.items():
            expression = expressions[0]
            if (
                len(expressions) != 1
                or not isinstance(expression, ast.BinOp)
                or not isinstance(expression.op, ast.Mult)
            ):
                continue
            for one, other in ((expression.left, expression.right), (expression.right, expression.left)):
                key = key_of(one)
                if key not in self.original.parameters or key in self.known or key in self.original.assigned:
                    continue
                products = [_number(text) for text in self.numbers[place]]
                try:
                    factors = [self.value(other, row, 0) for row in range(len(products))]
                except _Unknown:
                    continue
                pairs = [*zip(products, factors, strict=True)]
                if all(type(a) is int and type(b) is int and b and a % b == 0 for a, b in pairs):
                    self.known[key] = [a // b for a, b in pairs]

    def agrees(self, expression: ast.expr, column: tuple[str, ...]) -> bool:
        """Returns whether an expression has the numbers of a column; an instance may have none there."""
        try:
            values = [self.value(expression, row, 0) for row in range(len(column))]
        except _Unknown:
            return False
        texts = [_number(text) for text in column]
        return all(
            text is None or repr(value) == repr(text) for value, text in zip(values, texts, strict=True)
        ) and not self.is_indifferent(expression, values)

    def is_indifferent(self, expression: ast.expr, values: list[Any]) -> bool:
        """Returns whether an expression has the same values with another argument than its default: `max(dim, 4)`."""
        for key in self.assumed & self.known.keys():
            if key_of(expression) or not self.reads(expression, key, 0):
                continue
            before = self.known[key]
            for sign in (1, -1):
                steps = [sign * (1 if type(value) is int else abs(value) / 10 or 0.1) for value in before]
                self.known[key] = [value + step for value, step in zip(before, steps, strict=True)]
                try:
                    is_same = [self.value(expression, row, 0) for row in range(len(values))] == values
                except _Unknown:
                    is_same = False
                self.known[key] = before
                if is_same:
                    return True
        return False

    def reads(self, expression: ast.expr, key: str, depth: int) -> bool:
        """Returns whether an expression reads an argument, or a variable that does."""
        keys = {key_of(node) for node in ast.walk(expression)} - {""}
        inner = [self.variable(item) for item in keys - {key}] if depth < _DEEPEST else []
        return key in keys or any(item is not None and self.reads(item, key, depth + 1) for item in inner)

    def value(self, node: ast.expr, row: int, depth: int) -> Any:
        """Returns the value of an expression for an instance.

        Raises:
            _Unknown: It reads something without a known value.
        """
        key = key_of(node)
        if key:
            return self.value_of(key, row, depth)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self.value(node.operand, row, depth)
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            left, right = self.value(node.left, row, depth), self.value(node.right, row, depth)
            try:
                return _BINARY[type(node.op)](left, right)
            except (ArithmeticError, ValueError):
                raise _Unknown from None
        if isinstance(node, ast.Call) and ast.unparse(node.func) in _CALLS and not node.keywords:
            given = [self.value(item, row, depth) for item in node.args]
            try:
                return _CALLS[ast.unparse(node.func)](*given)
            except (ArithmeticError, ValueError, TypeError):
                raise _Unknown from None
        raise _Unknown

    def value_of(self, key: str, row: int, depth: int) -> Any:
        if key in self.known:
            return self.known[key][row]
        if depth > _DEEPEST:
            raise _Unknown
        if key.startswith("self."):
            name = key.removeprefix("self.")
            value = self.settings[row].get(name, self.constants.get(name))
            if type(value) in (int, float):
                return value
            raise _Unknown
        variable = self.variable(key)
        if variable is not None:
            return self.value(variable, row, depth + 1)
        raise _Unknown

    def variable(self, key: str) -> ast.expr | None:
        return self.chosen.get(key) or self.original.variable(key)

    def written(self, expression: ast.expr) -> str | None:
        """Returns the source of an expression in the constructor that is written, None if it has none."""
        try:
            return ast.unparse(_Names(self).visit(copy.deepcopy(expression)))
        except _Unknown:
            return None

    def name(self, key: str) -> ast.expr:
        """Returns the source of what an expression reads: an argument, an attribute, or a variable that is set.

        Raises:
            _Unknown: There is none.
        """
        if key.startswith("self."):
            name = key.removeprefix("self.")
            expressions = self.original.attributes.get(name, [])
            inner = key_of(expressions[0]) if len(expressions) == 1 else ""
            if inner in self.known:
                return self.name(inner)
            if name not in self.settings[0] and name in self.constants:
                return ast.Constant(self.constants[name])
            if self.attribute(name):
                return ast.parse(key, mode="eval").body
            raise _Unknown
        if key in self.known:
            key = self.same(key)
            root, _, name = key.rpartition(".")
            if root and name in [text for other, text in self.names.items() if other != key]:
                name = f"{root.removesuffix('_config').rpartition('.')[2]}_{name}"  # vision_hidden_size
            name = self.names.setdefault(key, name)
            if (
                [*self.names.values()].count(name) > 1
                or not name.isidentifier()
                or name.startswith("_")
                or name in RESERVED
            ):
                del self.names[key]
                raise _Unknown
            return ast.Name(name)
        variable = self.variable(key)
        if variable is not None and key_of(variable) in self.known:
            return self.name(key_of(variable))
        if variable is None or key in self.names.values():
            raise _Unknown
        if key not in self.is_set:
            text = self.written(variable)
            if text is None:
                raise _Unknown
            self.is_set.add(key)
            self.result.statements.append(f"{key} = {text}")
        return ast.Name(key)

    def same(self, key: str) -> str:
        """Returns the argument of the original that always has the value of a variable, or the variable itself."""
        values = [*map(repr, self.known[key])]
        assigned = self.original.assigned.get(key, [])
        read = [key_of(node) for value in assigned for node in ast.walk(value)]  # y = y or x
        others = [
            name
            for name in self.original.parameters
            if name != key and [*map(repr, self.known.get(name, []))] == values
            if name in read or (key not in self.original.parameters and "." not in key and len(set(values)) > 1)
        ]
        return others[0] if others else key

    def attribute(self, name: str) -> bool:
        """Notes the source of an attribute, and returns whether there is one."""
        expressions = self.original.attributes.get(name, [])
        if name in self.result.attributes or name in METHODS:
            return name not in METHODS
        if name in self.open:
            return False  # it is computed from itself
        column = tuple(repr(item.get(name)) for item in self.settings)
        if not expressions or not all(_number(text) is not None for text in column):
            return False
        if all(isinstance(item, ast.Constant) for item in expressions) and len(set(column)) == 1:
            return False  # a number of the original
        self.open.add(name)
        expression = self.only([inner for item in expressions for inner in self.branches(item)], column)
        text = self.written(expression) if expression is not None else None
        self.open.discard(name)
        if text is None and name not in self.names.values():
            self.known[f"self.{name}"] = [item[name] for item in self.settings]
            self.names[f"self.{name}"] = text = name
        if text is not None:
            self.result.attributes[name] = text
            self.result.statements.append(f"self.{name} = {text}")
        return text is not None


class _Names(ast.NodeTransformer):
    """Puts arguments of the written constructor in the place of what an expression of the original reads."""

    def __init__(self, solver: _Solver) -> None:
        self.solver = solver

    def visit(self, node: ast.AST) -> ast.AST:
        key = key_of(node)
        if key:
            return self.solver.name(key)
        if isinstance(node, ast.Call):
            node.args = [self.visit(item) for item in node.args]  # type: ignore[misc]
            return node
        return self.generic_visit(node)


def _text(value: Any) -> str:
    """Returns a number as a person writes it: 1e-6."""
    return re.sub(r"e-0(?=\d)", "e-", repr(value))


def _number(text: str) -> Any:
    """Returns the number of a text, None if it is none."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return value if type(value) in (int, float, bool) else None
