"""The text of a helper function from which branches were removed."""

from __future__ import annotations

import ast
import copy

from icenet.core.porting.source.lines import wrapped
from icenet.core.porting.source.simplify import text


class Printer:
    """Prints a changed function. Statements that are as before keep their text, with line breaks and comments."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines()
        self.before = {
            _span(item): ast.dump(item) for item in ast.walk(ast.parse(source)) if isinstance(item, ast.stmt)
        }

    def function(self, definition: ast.FunctionDef) -> str:
        head = copy.copy(definition)
        head.body = [ast.Pass()]
        lines = wrapped(text(head).splitlines()[-2].strip(), 0)
        return "\n".join([*lines, *self.block(definition.body, 4)])

    def block(self, statements: list[ast.stmt], indent: int) -> list[str]:
        lines: list[str] = []
        after_function = False
        for statement in statements:
            is_function = isinstance(statement, ast.FunctionDef)
            lines += [*([""] if is_function or after_function else []), *self.statement(statement, indent)]
            after_function = is_function
        return lines

    def statement(self, statement: ast.stmt, indent: int) -> list[str]:
        is_elif = isinstance(statement, ast.If) and self.lines[statement.lineno - 1].lstrip().startswith("elif ")
        if self.before.get(_span(statement)) == ast.dump(statement) and not is_elif:
            decorators = getattr(statement, "decorator_list", [])
            first = min(item.lineno for item in (statement, *decorators)) - 1
            last = statement.end_lineno or statement.lineno
            own = self.lines[first:last]
            return [line and " " * indent + line[statement.col_offset :] for line in own]
        if isinstance(statement, (ast.If, ast.For)):
            head = copy.copy(statement)
            head.body, head.orelse = [ast.Pass()], []
            lines = [*wrapped(text(head).splitlines()[0], indent), *self.block(statement.body, indent + 4)]
            if statement.orelse:
                lines += [" " * indent + "else:", *self.block(statement.orelse, indent + 4)]
            return lines
        return [part for line in text(statement).splitlines() for part in _wrapped(line, indent)]


def _wrapped(line: str, indent: int) -> list[str]:
    inner = line.lstrip()
    return wrapped(inner, indent + len(line) - len(inner))


def _span(statement: ast.stmt) -> tuple[int, int, int | None]:
    return getattr(statement, "lineno", 0), getattr(statement, "col_offset", 0), getattr(statement, "end_lineno", 0)
