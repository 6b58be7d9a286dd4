"""Takes the branches of a helper function that are known: by constants, or by the axes and dtypes of arrays."""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Set
from typing import Any

from icenet.core.porting import kinds
from icenet.core.porting.kinds import NUMBER, Kind


class Folder(ast.NodeTransformer):
    """Replaces parameters by constants in a function, and takes the branches that are known."""

    def __init__(
        self,
        constants: dict[str, ast.expr],
        not_none: set[str],
        definition: ast.FunctionDef,
        known: dict[str, Kind] | None = None,
        choices: dict[str, list[ast.expr]] | None = None,
        factors: Set[str] = frozenset(),
    ) -> None:
        self.factors = factors
        """The parameters that are 1 in every call; products leave them out."""
        self.choices = choices or {}
        """The constants that the calls give to a parameter, less those for which an earlier branch returned."""
        self.constants, self.not_none, self.definition = constants, not_none, definition
        self.kinds = known or {}
        """What is known about variables at the statement that is visited."""
        self.called: dict[str, list[tuple[list[Kind | None], dict[str, Kind | None]]]] = {}
        """The arguments of the calls of other helpers."""

    def fold(self) -> None:
        self.definition.body = _read(self.block(self.definition.body))

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for statement in statements:
            is_loop = isinstance(statement, (ast.For, ast.While, ast.With, ast.Try))
            for name in _stored(ast.AST if is_loop else ast.comprehension, statement):
                self.kinds.pop(name, None)
                self.not_none = self.not_none - {name}
            made = self.visit(self.paired(statement))
            if not isinstance(made, list):
                self.assigned(statement)
            if isinstance(made, ast.Assign) and self.sets_none(made):
                continue
            found += made if isinstance(made, list) else [made]
            if found and isinstance(found[-1], (ast.Return, ast.Raise)):
                break
        return found

    def paired(self, statement: ast.stmt) -> ast.stmt:
        """Returns `a, b = pair(a, b)` as what it does to an array and a number: the number becomes an array."""
        if ast.unparse(statement) != "a, b = pair(a, b)":
            return statement
        found = {name: self.kinds.get(name) for name in "ab"}
        arrays = [name for name, kind in found.items() if kind is not None and kind.category != NUMBER]
        if len(arrays) == 2:
            return ast.parse("a = a").body[0]
        other = {"a": "b", "b": "a"}[arrays[0]] if arrays else ""
        if not arrays or found[other] is None:
            return statement
        return ast.parse(f"{other} = mx.array({other}, {arrays[0]}.dtype)").body[0]

    def assigned(self, statement: ast.stmt) -> None:
        """Notes what a statement says about the variables that it sets."""
        known, parts = self.kinds, [statement]
        if isinstance(statement, ast.If):
            branches = [branch for branch in (statement.body, statement.orelse) if branch]
            parts = [item for part in branches if not isinstance(part[-1], ast.Return) for item in part]
        found: dict[str, Kind | None] = dict.fromkeys(name for part in parts for name in _stored(ast.AST, part))
        self.not_none = self.not_none - found.keys()
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            found[statement.targets[0].id] = kinds.of_expression(statement.value, known)
            is_array = isinstance(statement.value, ast.Call) and ast.unparse(statement.value.func).startswith("mx.")
            self.not_none |= {statement.targets[0].id} if is_array else set()
        elif ast.unparse(statement) == "a, b = pair(a, b)":
            first, second = known.get("a"), known.get("b")
            if first is not None and second is not None:
                found["a"] = Kind(second.category, 0, False) if first.category == NUMBER else first
                found["b"] = Kind(first.category, 0, False) if second.category == NUMBER else second
        self.kinds = {key: value for key, value in {**known, **found}.items() if value is not None}

    def visit_Call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Name):
            given = [kinds.of_expression(item, self.kinds) for item in node.args]
            named = {item.arg: kinds.of_expression(item.value, self.kinds) for item in node.keywords if item.arg}
            self.called.setdefault(node.func.id, []).append((given, named))
        return self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> Any:
        """Writes a comparison of constants as its result: `mode == "amax"` that a call of another helper gives on."""
        value = self.evaluated(node, {})
        return self.generic_visit(node) if value is None else ast.Constant(value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        outer, self.kinds = self.kinds, {}  # it may have arguments of the same names, and be called later
        self.generic_visit(node)
        self.kinds = outer
        return node

    def sets_none(self, statement: ast.Assign) -> bool:
        """Returns whether a statement sets a variable to None for the whole function, and notes it."""
        target, arguments = statement.targets[0], self.definition.args.args
        is_set = any(statement is item for item in self.definition.body) and is_none(statement.value)
        if not is_set or not isinstance(target, ast.Name) or target.id in {item.arg for item in arguments}:
            return False
        stores = [item for item in ast.walk(self.definition) if isinstance(item, ast.Name) and item.id == target.id]
        if sum(isinstance(item.ctx, ast.Store) for item in stores) != 1:
            return False
        self.constants[target.id] = statement.value
        return True

    def truth(self, test: ast.expr) -> bool | None:
        """Returns the value of a condition, None if it is not known."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self.truth(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            parts = [self.truth(item) for item in test.values]
            decisive = isinstance(test.op, ast.Or)
            if decisive in parts:
                return decisive
            return None if None in parts else not decisive
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            left, right = test.left, test.comparators[0]
            if isinstance(left, ast.Name) and left.id in self.not_none and is_none(right):
                return isinstance(test.ops[0], (ast.IsNot, ast.NotEq))
        of_kinds = kinds.truth(test, self.kinds)
        if of_kinds is not None:
            return of_kinds
        chosen = self.chosen(test)
        if chosen is not None:
            outcomes = {self.evaluated(test, {chosen: value}) for value in self.choices[chosen]}
            return outcomes.pop() if len(outcomes) == 1 else None
        return self.evaluated(test, {})

    def chosen(self, test: ast.expr) -> str | None:
        """Returns the parameter of several constants on which a condition depends, None if it is not one alone."""
        names = {item.id for item in ast.walk(test) if isinstance(item, ast.Name)} & self.choices.keys()
        return names.pop() if len(names) == 1 else None

    def evaluated(self, test: ast.expr, more: dict[str, ast.expr]) -> bool | None:
        """Returns the value of a condition of constants, None if it has others."""
        try:
            expression = _Put({**self.constants, **more}).visit(copy.deepcopy(test))
            if isinstance(expression, ast.Call) and ast.unparse(expression.func) == "mx.issubdtype":
                return _is_subdtype(*map(ast.unparse, expression.args))
            unknown = (item for item in ast.walk(expression) if isinstance(item, (ast.Name, ast.Call)))
            if any(isinstance(item, ast.Call) or item.id != "math" for item in unknown):
                return None
            if isinstance(expression, ast.Compare) and isinstance(expression.ops[0], (ast.Is, ast.IsNot)):
                same = ast.dump(expression.left) == ast.dump(expression.comparators[0])
                return same == isinstance(expression.ops[0], ast.Is)
            return bool(
                eval(compile(ast.Expression(ast.fix_missing_locations(expression)), "", "eval"), {"math": math})
            )
        except Exception:  # not an expression of constants
            return None

    def visit_If(self, node: ast.If) -> Any:
        value = self.truth(node.test)
        if value is None:
            node.test = self.reduced(node.test)
            before, given = dict(self.kinds), set(self.not_none)
            node.body = self.block(node.body)
            self.not_none = set(given)
            self.kinds = before
            node.orelse = self.block(node.orelse)
            self.kinds = before
            self.not_none = given - _stored(ast.If, node)
            chosen = self.chosen(node.test)
            if chosen is not None and isinstance(node.body[-1], ast.Return) and not node.orelse:
                rest = [
                    item for item in self.choices[chosen] if self.evaluated(node.test, {chosen: item}) is not True
                ]
                self.choices = {**self.choices, chosen: rest or self.choices[chosen]}
            return node
        return self.block(node.body if value else node.orelse)

    def visit_For(self, node: ast.For) -> Any:
        node.iter = self.visit(node.iter)
        node.body = self.block(node.body)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        value = self.truth(node.test)
        if value is None:
            node.test = self.reduced(node.test)
            node.body, node.orelse = self.visit(node.body), self.visit(node.orelse)
            return node
        return self.visit(node.body if value else node.orelse)

    def reduced(self, test: ast.expr) -> ast.expr:
        """Returns a condition without the parts that are known."""
        if isinstance(test, ast.BoolOp):
            parts = [self.reduced(item) for item in test.values if self.truth(item) is None]
            return parts[0] if len(parts) == 1 else ast.BoolOp(test.op, parts)
        return self.visit(test)

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        self.generic_visit(node)
        if isinstance(node.op, ast.Mult):
            for side, other in ((node.left, node.right), (node.right, node.left)):
                if isinstance(side, ast.Name) and side.id in self.factors:
                    return other
        return node

    def visit_Name(self, node: ast.Name) -> Any:
        value = self.constants.get(node.id)
        if value is not None and isinstance(node.ctx, ast.Load) and not _is_number(value):
            return copy.deepcopy(value)
        return node


def _stored(kind: type[ast.AST], tree: ast.AST) -> set[str]:
    """Returns the variables that are set in parts of a tree of a kind."""
    parts = [part for part in ast.walk(tree) if isinstance(part, kind)]
    names = [item for part in parts for item in ast.walk(part) if isinstance(item, ast.Name)]
    return {item.id for item in names if isinstance(item.ctx, ast.Store)}


def _read(statements: list[ast.stmt]) -> list[ast.stmt]:
    """Returns statements without `x = x` and without other names for variables that nothing reads."""
    loaded = {
        item.id
        for statement in statements
        for item in ast.walk(statement)
        if isinstance(item, ast.Name)
        and isinstance(item.ctx, ast.Load)
        and not (isinstance(statement, ast.Assign) and statement.value is item)
    }

    def is_kept(statement: ast.stmt) -> bool:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Name):
            return True
        target = statement.targets[0]
        if not isinstance(target, ast.Name):
            return True
        return target.id != statement.value.id and target.id in loaded

    return [item for item in statements if is_kept(item)]


def _is_subdtype(dtype: str, kind: str) -> bool | None:
    """Returns the value of `mx.issubdtype`, None if it is not known."""
    kinds = {"mx.integer": ("mx.int", "mx.uint"), "mx.floating": ("mx.float", "mx.bfloat")}
    is_known = kind in kinds and dtype.removeprefix("mx.").isidentifier() and dtype.startswith("mx.")
    return dtype.startswith(kinds[kind]) if is_known else None


class _Put(ast.NodeTransformer):
    def __init__(self, constants: dict[str, ast.expr]) -> None:
        self.constants = constants

    def visit_Name(self, node: ast.Name) -> Any:
        return copy.deepcopy(self.constants.get(node.id, node))


def _is_number(value: ast.expr) -> bool:
    """Returns whether an argument is a number, whose name says more than its value."""
    value = value.operand if isinstance(value, ast.UnaryOp) else value
    if isinstance(value, (ast.Tuple, ast.List)):
        return True
    return (
        isinstance(value, ast.Constant)
        and isinstance(value.value, (int, float))
        and not isinstance(value.value, bool)
    )


def is_none(value: ast.expr) -> bool:
    """Returns whether an expression is None."""
    return isinstance(value, ast.Constant) and value.value is None
