"""What the original says that its graph does not: second names of a variable, and those of the parts of a tuple."""

from __future__ import annotations

import ast
import functools
import linecache
from dataclasses import dataclass

from icenet.core.porting.statements import syntax_tree


@dataclass(frozen=True)
class Renaming:
    """A statement such as `shortcut = x`."""

    line: int
    name: str
    source: str


@dataclass(frozen=True)
class Function:
    """A function of the original: its lines, its statements such as `shortcut = x`, and `cos, sin = tables`."""

    first: int
    last: int
    renamings: tuple[Renaming, ...]
    parts: dict[str, tuple[str, ...]]


@functools.lru_cache(maxsize=64)
def _functions(file: str) -> tuple[Function, ...]:
    return tuple(_function(node) for node in ast.walk(syntax_tree(file)) if isinstance(node, ast.FunctionDef))


def _function(function: ast.FunctionDef) -> Function:
    renamings, parts = [], {}
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Name) or len(node.targets) != 1:
            continue
        target = node.targets[0]
        if isinstance(target, ast.Name):
            renamings.append(Renaming(node.lineno, target.id, node.value.id))
        elif isinstance(target, ast.Tuple) and all(isinstance(item, ast.Name) for item in target.elts):
            parts[node.value.id] = tuple(item.id for item in target.elts if isinstance(item, ast.Name))
    return Function(function.lineno, function.end_lineno or function.lineno, tuple(renamings), parts)


def _function_at(file: str, line: int) -> Function | None:
    """Returns the innermost function around a line."""
    inside = [item for item in _functions(file) if item.first <= line <= item.last]
    return max(inside, default=None, key=lambda item: item.first)


def second_name(file: str, variable: str, after: int, until: int) -> str:
    """Returns the last name to which a function assigns a variable as it is, empty if there is none.

    Args:
        file: The file of the function.
        variable: The variable.
        after: The line of the statement that sets the variable, 0 for a parameter. In a loop it is a later one.
        until: The line of the statement that gives the variable another value.
    """
    function = _function_at(file, until)
    start = after if after < until else 0
    found = function.renamings if function is not None else ()
    names = [
        item.name
        for item in found
        if item.source == variable and start < item.line < until and _function_at(file, item.line) is function
    ]
    return names[-1] if names else ""


@functools.lru_cache(maxsize=64)
def _loops(file: str) -> tuple[tuple[int, int, dict[str, str]], ...]:
    """Returns first and last line of each loop of a file, and the variables of its elements by the lists."""
    found = []
    kinds = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)
    for node in ast.walk(syntax_tree(file)):
        if isinstance(node, kinds):
            names = _elements(node) if isinstance(node, ast.For) else {}
            found.append((node.lineno, node.end_lineno or node.lineno, names))
    return tuple(found)


def _elements(loop: ast.For) -> dict[str, str]:
    """Returns the variables of a loop by the lists of which they are the elements; none if they are no names."""
    target, given = loop.target, loop.iter
    if isinstance(given, ast.Call) and ast.unparse(given.func) == "enumerate" and isinstance(target, ast.Tuple):
        target, given = target.elts[-1], given.args[0]
    if isinstance(given, ast.Call) and ast.unparse(given.func) == "zip" and isinstance(target, ast.Tuple):
        pairs = list(zip(given.args, target.elts, strict=False))
    else:
        pairs = [(given, target)]
    return {ast.unparse(item): name.id for item, name in pairs if isinstance(name, ast.Name)}


def loop_at(file: str, line: int) -> tuple[int, int] | None:
    """Returns first and last line of the loop or comprehension that begins at a line, None without one."""
    return next((found[:2] for found in _loops(file) if found[0] == line), None)


def is_in_loop(file: str, line: int) -> bool:
    """Returns whether a statement may run more than once in a call of its function, or has a loop within it."""
    return any(first <= line <= last for first, last, _ in _loops(file)) or "map(" in linecache.getline(file, line)


def loop_names(file: str, line: int) -> dict[str, str]:
    """Returns the variables of the innermost loop around a statement by the lists of which they are the elements.

    None outside of loops, and in files of torch, whose `mod` says less than a name of the list.
    """
    around = [(first, names) for first, last, names in _loops(file) if first < line <= last]
    return max(around, key=lambda item: item[0])[1] if around and "/torch/nn/" not in file else {}


@functools.lru_cache(maxsize=64)
def _appends(file: str) -> tuple[tuple[int, str, str], ...]:
    """Returns the line of each `a.append(b)` of a file, a and b."""
    return tuple(
        (node.lineno, node.func.value.id, ast.unparse(node.args[0]))
        for node in ast.walk(syntax_tree(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append"
        if isinstance(node.func.value, ast.Name) and len(node.args) == 1
    )


def appended_to(file: str, line: int, variable: str) -> str:
    """Returns the list to which the innermost loop around a line appends a variable, or else another value.

    Empty if the loop appends to none.
    """
    around = max(((first, last) for first, last, _ in _loops(file) if first < line <= last), default=(0, 0))
    found = {value: name for at, name, value in _appends(file) if around[0] < at <= around[1]}
    return found.get(variable) or next(iter(found.values()), "")


def tuple_names(file: str, line: int) -> tuple[str, ...]:
    """Returns the variables of the innermost loop around a statement: those of `for a, b in pairs`."""
    around = [(first, parts) for first, last, parts in _pairs(file) if first < line <= last]
    return max(around)[1] if around else ()


@functools.lru_cache(maxsize=64)
def _pairs(file: str) -> tuple[tuple[int, int, tuple[str, ...]], ...]:
    """Returns first and last line of each loop of a file, and its variables if they are a tuple of its element."""
    found = []
    for node in ast.walk(syntax_tree(file)):
        if isinstance(node, ast.For):
            names = node.target.elts if isinstance(node.target, ast.Tuple) else []
            is_element = not isinstance(node.iter, ast.Call) and all(isinstance(name, ast.Name) for name in names)
            parts = tuple(ast.unparse(name) for name in names) if is_element else ()
            found.append((node.lineno, node.end_lineno or node.lineno, parts))
    return tuple(found)


def part_names(file: str, line: int, argument: str) -> tuple[str, ...]:
    """Returns the variables to which the function at a line gives the parts of an argument, none if it does not."""
    function = _function_at(file, line)
    return function.parts.get(argument, ()) if function is not None else ()
