"""Every file and function that `docs/architecture.md` names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from helpers import ROOT

NAMED = re.compile(r"`([\w/]+\.py)(?::\s+([\w.]+))?`|\[\"([\w/]+\.py)[^\"<]*<br>([\w.]+)\"\]")
"""`core/rng.py: key` in the text, and ["core/rng.py<br>key"] in a diagram."""


def names(path: Path) -> set[str]:
    """Returns the functions, classes, methods and variables of a module."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return defined | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def test_the_files_and_names_exist() -> None:
    found = NAMED.findall((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    assert len(found) >= 30
    for text_file, text_name, diagram_file, diagram_name in found:
        file, name = text_file or diagram_file, text_name or diagram_name
        path = next((path for path in (ROOT / "icenet" / file, ROOT / file) if path.is_file()), None)
        assert path is not None, file
        missing = set(name.split(".") if name else ()) - names(path)
        assert not missing, f"{file}: {name}"
