"""Conventions that a linter does not check: docstrings, postponed annotations, plain words."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from helpers import ROOT
from source_tree import ALL

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

PLAIN_WORDS = {
    r"\banew\b(?!\")": "again, from scratch",  # except in the keys of draws, which decide their numbers
    r"\bbeside\b": "next to, besides",
    r"\bcomes? to\b": "is, adds up to",
    r"\bhears? of\b": "learns, receives",
    r"\bof (?:the user's|one's) own\b": "the user's",
    r"\bthat is no\b": "not a valid",
    r"\bwhere there (?:is|are) none\b": "if absent",
    r"\basks? for\b": "requests",
    r"\basked for\b": "requested",
    r"\bgo(?:es)? on\b": "continues",
    r"\bnobody\b": "no one, or the thing itself",
    r"\btells? apart\b|\btold apart\b": "distinguishes",
}
"""Phrases of earlier versions, and the plain words that replace them."""


def test_every_module_has_a_docstring_and_postponed_annotations() -> None:
    for name, path in ALL.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{name} has no docstring"
        if any(isinstance(node, (ast.FunctionDef, ast.AnnAssign)) for node in ast.walk(tree)):
            assert "from __future__ import annotations" in path.read_text(encoding="utf-8"), name


def defined(path: Path) -> set[str]:
    """Returns the names that a module defines at any depth, imported ones included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def missing_names(text: str) -> list[str]:
    """Returns the names of modules, functions and classes of the project in a text that do not exist."""
    found = []
    for name in re.findall(r"`((?:icenet|icenet_torch)(?:\.[A-Za-z_]\w*)+)`", text):
        module = name
        while module not in ALL:
            module = module.rpartition(".")[0]
        attribute = name[len(module) + 1 :].partition(".")[0]
        if attribute not in ("", "NAME") and attribute not in defined(ALL[module]):
            found.append(name)
    return found


@pytest.mark.parametrize("folder", ["icenet", "icenet_torch"])
def test_the_names_in_docstrings_and_comments_exist(folder: str) -> None:
    texts = {name: path.read_text(encoding="utf-8") for name, path in ALL.items() if name.startswith(f"{folder}.")}
    assert {name: found for name, text in texts.items() if (found := missing_names(text))} == {}
    assert missing_names("`icenet.core.rng.no_name`, `icenet.no_module.x`, `icenet.load`, `icenet.core.rng`") == [
        "icenet.core.rng.no_name",
        "icenet.no_module.x",
    ]


def phrases(text: str) -> list[str]:
    """Returns the phrases of a text that have a plain replacement, with their lines."""
    return [
        f"{text.count(chr(10), 0, match.start()) + 1}: {' '.join(match.group().split())} -> {plain}"
        for pattern, plain in PLAIN_WORDS.items()
        for match in re.finditer(pattern.replace(" ", r"\s+"), text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("path", [*ALL.values(), *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_plain(path: Path) -> None:
    assert phrases(path.read_text(encoding="utf-8")) == []


def test_these_rules_can_fail() -> None:
    assert phrases("It comes\nto 3 and is read anew.") == [
        "2: anew -> again, from scratch",
        "1: comes to -> is, adds up to",
    ]
