"""The code blocks of the documentation pages."""

from __future__ import annotations

import re

from helpers import ROOT

PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))


def blocks(page: str, *languages: str, skip: str | None = None) -> list[tuple[str, str]]:
    """Returns the code blocks of a page, as (language, content).

    Args:
        page: A path in the checkout.
        languages: Which blocks.
        skip: Leaves out sections with this text in their title.
    """
    found = []
    for section in re.split(r"^(?=##+ )", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE):
        if skip is None or skip not in section.partition("\n")[0]:
            found += re.findall(rf"^```({'|'.join(languages)})\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return found


def code(page: str, language: str) -> list[str]:
    """Returns the content of the code blocks of one language."""
    return [content for _, content in blocks(page, language)]


def rows(page: str, title: str) -> list[list[str]]:
    """Returns the cells of the rows of the first table of a section, without the head."""
    text = (ROOT / page).read_text(encoding="utf-8")
    section = re.split(rf"^##+ {re.escape(title)}$", text, flags=re.MULTILINE)[1]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert lines, title
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()[2:]]
