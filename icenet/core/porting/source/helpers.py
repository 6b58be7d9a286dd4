"""The source of the functions that operations need, read from the files of `icenet/porting/functions`."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from pathlib import Path

_FOLDER = Path(__file__).parents[3] / "porting" / "functions"


@functools.lru_cache(maxsize=1)
def _functions() -> dict[str, tuple[str, frozenset[str], int]]:
    """Returns the source of each function and constant, the names that it uses, and its place."""
    found: dict[str, tuple[str, frozenset[str], int]] = {}
    for path in sorted(_FOLDER.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name]
                start = min([node.lineno, *(item.lineno for item in node.decorator_list)])
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names, start = [node.targets[0].id], node.lineno
            else:
                continue
            source = "\n".join(lines[start - 1 : node.end_lineno])
            used = _names_read(node) | frozenset({"math"} if "math." in source else set())
            for name in names:
                found[name] = (source, used, len(found))
    return found


def _names_read(node: ast.AST) -> frozenset[str]:
    """Returns the global names that a definition reads: an argument may have the name of a function."""
    own = {item.arg for item in ast.walk(node) if isinstance(item, ast.arg)}
    names = [item for item in ast.walk(node) if isinstance(item, ast.Name)]
    own |= {item.id for item in names if isinstance(item.ctx, ast.Store)}
    return frozenset(item.id for item in names) - own


def needed(names: set[str]) -> list[str]:
    """Returns functions and what they use, in the order of the files."""
    known = _functions()
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        if name not in known:
            raise KeyError(name)
        found.add(name)
        pending.extend(used for used in known[name][1] if used in known)
    return sorted(found, key=lambda item: known[item][2])


def callers_first(names: list[str]) -> list[str]:
    """Returns functions in an order in which each comes after those that use it."""
    known = _functions()
    found: list[str] = []
    rest = list(names)
    while rest:
        name = next(
            (name for name in rest if not any(name in known[other][1] for other in rest if other != name)), rest[0]
        )
        rest.remove(name)
        found.append(name)
    return found


def read_in(trees: Iterable[ast.AST]) -> set[str]:
    """Returns the names that statements and functions read."""
    return {item.id for tree in trees for item in ast.walk(tree) if isinstance(item, ast.Name)}


def uses(name: str, other: str) -> bool:
    """Returns whether a function reads the name of another one."""
    return other in _functions()[name][1]


def source(name: str) -> str:
    """Returns the source of a function."""
    return _functions()[name][0]


def sources(names: set[str]) -> list[str]:
    """Returns the source of functions and of what they use, in the order of the files."""
    return [source(name) for name in needed(names)]


def exists(name: str) -> bool:
    """Returns whether there is a function of a name."""
    return name in _functions()
