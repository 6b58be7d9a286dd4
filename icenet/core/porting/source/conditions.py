"""The numbers on which the turns of a loop of the original may depend, such as 14 in `if t > 14:`.

An export runs the turns of the example alone, so it sees no decision that a later turn makes.
"""

from __future__ import annotations

import ast
import functools

from icenet.core.porting.statements import syntax_tree


@functools.lru_cache(maxsize=64)
def numbers_around(file: str, line: int, whole_class: bool = False) -> tuple[int | str, ...]:
    """Returns the integers and names that a function compares, divides by, or takes elements with.

    Args:
        file: The file of the function.
        line: A line of the function.
        whole_class: Whether to return those of all functions of its class, and of the file outside of classes.

    Returns:
        Integers, and names such as `self.window`, which may be anything.
    """
    tree = syntax_tree(file)
    kind = ast.ClassDef if whole_class else (ast.FunctionDef, ast.AsyncFunctionDef)
    around = [item for item in ast.walk(tree) if isinstance(item, kind) and _surrounds(item, line)]
    if not around:
        return ()
    read: list[ast.AST] = [max(around, key=lambda item: item.lineno)]
    if whole_class:
        read += [item for item in tree.body if isinstance(item, ast.FunctionDef)]
    found: dict[int | str, None] = {}
    for node in (node for item in read for node in ast.walk(item)):
        if _decides(node):
            found.update(dict.fromkeys(value for part in ast.walk(node) for value in _values(part)))
    return tuple(found)


def _surrounds(item: ast.stmt, line: int) -> bool:
    return item.lineno <= line <= (item.end_lineno or item.lineno)


def _decides(node: ast.AST) -> bool:
    """Returns whether turns may differ by the value of an expression."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, (ast.Mod, ast.FloorDiv))
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("min", "max", "divmod")
    return isinstance(node, (ast.Compare, ast.Slice, ast.Subscript))


def _values(node: ast.AST) -> list[int | str]:
    if isinstance(node, ast.Constant):
        return [node.value] if type(node.value) is int else []
    is_name = isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load)
    return [ast.unparse(node)] if is_name else []
