"""Numbered variables with the name that is free: `x_2` is `x` where nothing reads the earlier x any more."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from icenet.core.porting.source.lines import Body
from icenet.core.porting.source.simplify import text


def join_names(body: Body, trees: dict[int, ast.stmt]) -> None:
    """Gives variables the names that are free where they are used.

    Args:
        body: The body.
        trees: The statements of its lines, by the identity of the line.
    """
    lines = ["    " * line.depth + (text(trees[id(line)]) if id(line) in trees else line.code) for line in body.lines]
    statements = ast.parse("\n".join(lines)).body
    conflicts = _Conflicts(statements)
    names = {*conflicts.variables, *body.names}
    new: dict[str, str] = {}
    for name in conflicts.variables:
        match = re.fullmatch(r"(.+?)_\d+", name)
        if match is None or name in body.names:
            continue
        alike = [other for other in names if other == match[1] or re.fullmatch(rf"{match[1]}_\d+", other)]
        for other in sorted({new.get(other, other) for other in alike if other != name}, key=lambda x: (len(x), x)):
            if other not in conflicts.of(name):
                conflicts.join(name, other)
                new |= {old: other for old, target in new.items() if target == name} | {name: other}
                break
    for line in body.lines:
        for node in ast.walk(trees[id(line)]) if new and id(line) in trees else ():
            if isinstance(node, ast.Name):
                node.id = new.get(node.id, node.id)


class _Conflicts:
    """Which variables of some statements hold values that are needed at the same time."""

    def __init__(self, statements: list[ast.stmt]) -> None:
        self.pairs: dict[str, set[str]] = {}
        self.variables: dict[str, None] = {}
        self.live(statements, frozenset())

    def of(self, name: str) -> set[str]:
        return self.pairs.get(name, set())

    def join(self, name: str, other: str) -> None:
        """Notes that a variable has the name of another one."""
        for third in self.of(name):
            self.pairs[third] = self.pairs[third] | {other}
        self.pairs[other] = self.of(other) | self.of(name)

    def live(self, statements: list[ast.stmt], after: frozenset[str]) -> frozenset[str]:
        """Returns the variables that are read from some statements on, and notes the conflicts in them."""
        for statement in reversed(statements):
            after = self.before(statement, after)
        return after

    def before(self, statement: ast.stmt, after: frozenset[str]) -> frozenset[str]:
        if isinstance(statement, ast.If):
            return self.live(statement.body, after) | self.live(statement.orelse, after) | _read(statement.test)
        if isinstance(statement, ast.For):
            inside = after
            while True:
                start = self.assigned(statement.target, self.live(statement.body, inside))
                if start <= inside:
                    return inside | _read(statement.iter)
                inside |= start
        if isinstance(statement, (ast.Return, ast.Raise)):
            return _read(statement)
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
            value = statement.value
            is_copy = isinstance(target, ast.Name) and isinstance(value, ast.Name)
            return self.assigned(target, after, _read(value) if is_copy else frozenset()) | _read(value)
        return after | _read(statement)

    def assigned(self, target: ast.expr, after: frozenset[str], same: frozenset[str] = frozenset()) -> frozenset[str]:
        """Returns what is live before an assignment, without what its value reads."""
        names = [
            node.id for node in ast.walk(target) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        ]
        for name in names:
            self.variables.setdefault(name)
            for other in (after | set(names)) - {name} - same:
                self.pairs.setdefault(name, set()).add(other)
                self.pairs.setdefault(other, set()).add(name)
        return after - set(names) | _read(target)


def _read(node: ast.AST) -> frozenset[str]:
    def names() -> Iterator[str]:
        for item in ast.walk(node):
            if isinstance(item, ast.Name) and not isinstance(item.ctx, ast.Store):
                yield item.id

    return frozenset(names())
