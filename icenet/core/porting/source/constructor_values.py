"""The values of expressions of an original's constructor, by what is known of its arguments."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from icenet.core.porting.source.constructor_syntax import Original, alternatives, key_of

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


class Unknown(Exception):
    """An expression has no value that is known, or no source."""


@dataclass
class Values:
    """The values that a constructor had in each instance.

    Attributes:
        original: The constructor.
        constants: The numbers of its class, by name.
        settings: The attributes of each instance that are numbers.
        known: The values of arguments and their parts, one for each instance.
        assumed: The arguments of which only the default is known. An instance may have been given another value.
        chosen: The expressions of variables of which the original has several, `b` in `a or b`.
    """

    original: Original
    constants: dict[str, Any]
    settings: list[dict[str, Any]]
    known: dict[str, list[Any]] = field(default_factory=dict)
    assumed: set[str] = field(default_factory=set)
    chosen: dict[str, ast.expr] = field(default_factory=dict)

    def of(self, node: ast.expr, row: int, depth: int = 0) -> Any:
        """Returns the value of an expression for an instance.

        Raises:
            Unknown: It reads something without a known value.
        """
        key = key_of(node)
        if key:
            return self.of_key(key, row, depth)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self.of(node.operand, row, depth)
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            left, right = self.of(node.left, row, depth), self.of(node.right, row, depth)
            try:
                return _BINARY[type(node.op)](left, right)
            except (ArithmeticError, ValueError):
                raise Unknown from None
        if isinstance(node, ast.Call) and ast.unparse(node.func) in _CALLS and not node.keywords:
            given = [self.of(item, row, depth) for item in node.args]
            try:
                return _CALLS[ast.unparse(node.func)](*given)
            except (ArithmeticError, ValueError, TypeError):
                raise Unknown from None
        raise Unknown

    def of_key(self, key: str, row: int, depth: int = 0) -> Any:
        """Returns the value of an argument, an attribute or a variable for an instance."""
        if key in self.known:
            return self.known[key][row]
        if depth > _DEEPEST:
            raise Unknown
        if key.startswith("self."):
            name = key.removeprefix("self.")
            value = self.settings[row].get(name, self.constants.get(name))
            if type(value) in (int, float):
                return value
            raise Unknown
        variable = self.variable(key)
        if variable is not None:
            return self.of(variable, row, depth + 1)
        raise Unknown

    def variable(self, key: str) -> ast.expr | None:
        """Returns the expression of a variable, None if it is not known which one it has."""
        return self.chosen.get(key) or self.original.variable(key)

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

    def agrees(self, expression: ast.expr, column: tuple[str, ...]) -> bool:
        """Returns whether an expression has the numbers of a column; an instance may have none there."""
        try:
            values = [self.of(expression, row) for row in range(len(column))]
        except Unknown:
            return False
        texts = [number(text) for text in column]
        return all(
            text is None or repr(value) == repr(text) for value, text in zip(values, texts, strict=True)
        ) and not self.is_indifferent(expression, values)

    def is_indifferent(self, expression: ast.expr, values: list[Any]) -> bool:
        """Returns whether an expression has the same values with another argument than its default: `max(dim, 4)`."""
        assumed = self.assumed & self.known.keys()
        read = [key for key in assumed if not key_of(expression) and self.reads(expression, key)]
        return any(self.is_same_beside(expression, values, key, sign) for key in read for sign in (1, -1))

    def is_same_beside(self, expression: ast.expr, values: list[Any], key: str, sign: int) -> bool:
        """Returns whether an expression has the same values with a slightly larger or smaller argument."""
        before = self.known[key]
        steps = [sign * (1 if type(value) is int else abs(value) / 10 or 0.1) for value in before]
        self.known[key] = [value + step for value, step in zip(before, steps, strict=True)]
        try:
            return [self.of(expression, row) for row in range(len(values))] == values
        except Unknown:
            return False
        finally:
            self.known[key] = before

    def reads(self, expression: ast.expr, key: str, depth: int = 0) -> bool:
        """Returns whether an expression reads an argument, or a variable that does."""
        keys = {key_of(node) for node in ast.walk(expression)} - {""}
        inner = [self.variable(item) for item in keys - {key}] if depth < _DEEPEST else []
        return key in keys or any(item is not None and self.reads(item, key, depth + 1) for item in inner)


def number(text: str) -> Any:
    """Returns the number of a text, None if it is none."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return value if type(value) in (int, float, bool) else None
