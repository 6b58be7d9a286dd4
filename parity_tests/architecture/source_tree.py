"""The source tree as the rules of this folder see it: modules, imports and classes, read from the AST."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from helpers import ROOT


def modules(folder: str) -> dict[str, Path]:
    """Returns every module below a folder of the checkout, by its dotted name."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_in(name: str, *packages: str) -> bool:
    """Returns whether a dotted name is one of `packages` or inside one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def is_standard(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def subfolders(package: str) -> set[str]:
    return {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}


BACKEND_FOLDERS = sorted((subfolders("icenet") & subfolders("icenet_torch")) - {"core"})
"""A folder that is in both packages is a backend. `icenet_torch.core` only repeats names of `icenet.core`."""

ONE_DIRECTION = "porting"
"""A backend folder that is no mirror: PyTorch's side exports a module, MLX's side loads the port of it."""

ALL = {**modules("icenet"), **modules("icenet_torch")}
MLX = {name: path for name, path in ALL.items() if is_in(name, *(f"icenet.{folder}" for folder in BACKEND_FOLDERS))}
TORCH = modules("icenet_torch")
SHARED = {name: path for name, path in ALL.items() if name not in MLX and name not in TORCH}
"""The modules that know no framework."""

Import = tuple[int, str]
"""A line and a dotted name."""


def imports(path: Path, types: bool = True) -> Iterator[Import]:
    """Yields each imported name of a file, also inside functions. `from a import b` is `a.b`.

    Without `types`, imports that only a type checker executes are left out.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    only_types = {id(node) for block in blocks for node in ast.walk(block)} if not types else set()
    for node in ast.walk(tree):
        if id(node) in only_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def violations(files: Mapping[str, Path], is_allowed: Callable[[str], bool], types: bool = True) -> list[str]:
    """Returns the imports of files that are not allowed, as `file:line: name`."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files.values()
        for line, name in imports(path, types)
        if not is_allowed(name)
    ]


def import_graph(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Returns for each module the modules of `files` that it imports when it runs, early or late."""
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        targets = (
            target if target in files else target.rpartition(".")[0] for _, target in imports(path, types=False)
        )
        graph[name] = {target for target in targets if target in files and target != name}
    return graph


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Returns the cycles of a graph: its strongly connected components of more than one node (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found
