"""The statements of the original's source: which one stands at a line, and to which variables it assigns."""

from __future__ import annotations

import ast
import functools
import linecache

from icenet.core.porting.record import Place

_SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr, ast.Raise, ast.Assert, ast.Delete)
_COMPOUND = (ast.For, ast.While, ast.If, ast.With)
_CONTAINERS = (ast.List, ast.Tuple, ast.Dict, ast.Set, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.MatMult: "matmul",
    ast.Pow: "pow",
}


def place_at(file: str, line: int) -> Place:
    """Returns the statement at a line of a file; the line itself if it belongs to no simple statement."""
    return _places(file).get(line) or Place(file, line, linecache.getline(file, line).strip())


def syntax_tree(file: str) -> ast.Module:
    """Returns the syntax tree of a file, an empty one if it is none of Python."""
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return ast.Module([], [])


@functools.cache
def _places(file: str) -> dict[int, Place]:
    """Returns the statement at each line of a file. Statements that begin on one line are one place."""
    tree = syntax_tree(file)
    found: dict[int, Place] = {}
    headers = {node.lineno for node in ast.walk(tree) if isinstance(node, _COMPOUND)}
    for statement in ast.walk(tree):
        if isinstance(statement, _SIMPLE):
            first, targets = statement.lineno, _assigned(statement)
            before = found.get(first)
            operations = (_operation(statement),) if len(targets) == 1 else ("",) * len(targets)
            has_all = first not in headers and _has_all(statement)
            is_several = before is not None or first in headers
            if before is not None:
                named = dict(zip(before.targets, before.operations, strict=True))
                # of a variable that is set twice the value is not sure
                repeated = {name for name in targets if name in named}
                named |= dict(zip(targets, operations, strict=True)) | dict.fromkeys(repeated, "")
                targets, operations = tuple(named), tuple(named.values())
                has_all = has_all and before.has_all and not repeated
            code = linecache.getline(file, first).strip()
            place = Place(file, first, code, targets, is_several, operations, has_all)
            for line in range(first, (statement.end_lineno or first) + 1):
                found[line] = place
    return found


def _has_all(statement: ast.stmt) -> bool:
    """Returns whether a statement assigns what it computes to variables, and not a list of several values to one."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return False
    return not any(isinstance(node, _CONTAINERS) for node in ast.walk(statement.value))


def _operation(statement: ast.stmt) -> str:
    """Returns the name of the outermost operation in the value that a statement assigns, empty if it has none."""
    value = statement.value if isinstance(statement, ast.Assign) else None
    if isinstance(value, ast.BinOp):
        return _OPERATORS.get(type(value.op), "")
    if isinstance(value, ast.Call):
        function = value.func
        return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return ""


def _assigned(statement: ast.stmt) -> tuple[str, ...]:
    """Returns the variables to which a statement assigns, or which it changes in place."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        return _targets(statement.targets[0])
    if isinstance(statement, (ast.AugAssign, ast.AnnAssign)):
        return _targets(statement.target)
    return _changed(statement.value) if isinstance(statement, ast.Expr) else ()


def _changed(node: ast.expr) -> tuple[str, ...]:
    """Returns the variable that a call changes in place: `x.index_add_(...)`."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return ()
    is_in_place = node.func.attr.endswith("_") and not node.func.attr.endswith("__")
    return _targets(node.func.value) if is_in_place else _changed(node.func.value)


def _targets(node: ast.expr) -> tuple[str, ...]:
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(name for item in node.elts for name in (_targets(item) or ("_",)))
    if isinstance(node, (ast.Subscript, ast.Attribute, ast.Starred)):
        return _targets(node.value) if not isinstance(node, ast.Attribute) else (node.attr,)
    return ()
