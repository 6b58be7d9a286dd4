"""Helper functions of a port without what nothing reads, and without functions of one expression."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterable

_WIDTH = 100
"""Longest statement that is returned without a variable."""


def tidy(definition: ast.FunctionDef, before: ast.AST) -> None:
    """Removes variables that nothing reads or that are a number, in place.

    Args:
        definition: A function from which branches were removed.
        before: The function with them.
    """
    kept = {ast.dump(item) for item in ast.walk(before) if isinstance(item, ast.Assign)}
    _put_numbers(definition, kept)
    _remove_unread(definition)
    *rest, last = definition.body
    value = last.value if isinstance(last, ast.Return) else None
    if rest and isinstance(value, ast.Name) and isinstance(rest[-1], ast.Assign):
        is_short = len(ast.unparse(rest[-1].value)) <= _WIDTH
        if ast.unparse(rest[-1].targets[0]) == value.id and is_short:
            definition.body = [*rest[:-1], ast.Return(rest[-1].value)]


def _stores(definition: ast.FunctionDef) -> Counter[str]:
    names = [item for item in ast.walk(definition) if isinstance(item, ast.Name)]
    found = Counter(item.id for item in names if isinstance(item.ctx, ast.Store))
    found.update(item.arg for item in ast.walk(definition) if isinstance(item, ast.arg))
    return found


def _put_numbers(definition: ast.FunctionDef, kept: set[str]) -> None:
    """Puts a number in the place of a variable that has become one: `axis = 1 if x.ndim > 1 else 0`."""
    stores = _stores(definition)
    for statement in list(definition.body):
        if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Constant):
            continue
        target = statement.targets[0]
        is_new = ast.dump(statement) not in kept and type(statement.value.value) is int
        if is_new and isinstance(target, ast.Name) and stores[target.id] == 1:
            definition.body.remove(statement)
            _Put({target.id: statement.value}).visit(definition)


def _remove_unread(definition: ast.FunctionDef) -> None:
    while True:
        names = [item for item in ast.walk(definition) if isinstance(item, ast.Name)]
        read = {item.id for item in names if isinstance(item.ctx, ast.Load)}
        dead = [
            item
            for item in definition.body
            if isinstance(item, ast.Assign)
            and isinstance(item.targets[0], ast.Name)
            and item.targets[0].id not in read
        ]
        if not dead:
            return
        definition.body = [item for item in definition.body if item not in dead]


def inline(trees: dict[str, ast.AST], others: Iterable[ast.AST]) -> set[str]:
    """Writes the private functions that are one expression where they are called.

    Args:
        trees: The functions by name, changed in place.
        others: Further statements that call them, changed in place.

    Returns:
        The names of the functions that nothing calls any more.
    """
    callers = [*trees.values(), *others]
    gone = set()
    for name, tree in trees.items():
        expression = _expression(tree) if name.startswith("_") else None
        if expression is None or not isinstance(tree, ast.FunctionDef):
            continue
        parameters = [item.arg for item in tree.args.args]
        uses = Counter(item.id for item in ast.walk(expression) if isinstance(item, ast.Name))
        inliner = _Inline(name, parameters, uses, expression)
        for caller in callers:
            if caller is not tree:
                inliner.visit(caller)
        rest = (
            item.id
            for caller in callers
            if caller is not tree
            for item in ast.walk(caller)
            if isinstance(item, ast.Name)
        )
        if name not in rest:
            gone.add(name)
    return gone


def _expression(tree: ast.AST) -> ast.expr | None:
    """Returns what a function returns if it does nothing else."""
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list or tree.args.vararg or tree.args.defaults:
        return None
    body = [item for item in tree.body if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))]
    return body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) else None


class _Put(ast.NodeTransformer):
    def __init__(self, values: dict[str, ast.expr]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self.values.get(node.id, node))


class _Inline(ast.NodeTransformer):
    """Puts the expression of a function in the place of its calls."""

    def __init__(self, name: str, parameters: list[str], uses: Counter[str], expression: ast.expr) -> None:
        self.name, self.parameters, self.uses, self.expression = name, parameters, uses, expression

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.func, ast.Name) or node.func.id != self.name or node.keywords:
            return node
        values = dict(zip(self.parameters, node.args, strict=False))
        is_bound = len(node.args) == len(self.parameters) and not any(
            isinstance(item, ast.Starred) for item in node.args
        )
        is_plain = all(
            self.uses[key] <= 1 or isinstance(value, (ast.Name, ast.Constant)) for key, value in values.items()
        )
        return _Put(values).visit(copy.deepcopy(self.expression)) if is_bound and is_plain else node
