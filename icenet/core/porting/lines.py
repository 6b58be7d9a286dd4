"""Statements of a source as text: their lines, brackets and lists."""

from __future__ import annotations

import re
from dataclasses import dataclass

from icenet.core.porting.record import Array
from icenet.core.porting.table.base import mlx_dtype

WIDTH = 112
"""Longest line."""


@dataclass
class Line:
    """One statement, and a comment about its shape."""

    code: str
    comment: str = ""
    depth: int = 0


@dataclass
class Body:
    """The text of one call of a module."""

    parameters: list[str]
    lines: list[Line]
    returns: list[str]
    """The names of the values that it returns."""

    def key(self) -> str:
        return "\n".join([", ".join(self.parameters), *("    " * line.depth + line.code for line in self.lines)])


def lists(line: str) -> str:
    """Writes a list of equal constructors with `range`."""
    match = re.fullmatch(r"(.* = )?\[(.*)\]", line)
    if match is None:
        return line
    parts = split(match[2])
    runs: list[tuple[str, int]] = []
    for part in parts:
        part = lists(part)
        if runs and runs[-1][0] == part:
            runs[-1] = (part, runs[-1][1] + 1)
        else:
            runs.append((part, 1))
    if len(runs) == 1 and runs[0][1] > 1:
        return f"{match[1] or ''}[{runs[0][0]} for _ in range({runs[0][1]})]"
    texts = []
    for part, count in runs:
        texts += [f"*({part} for _ in range({count}))"] if count > 2 else [part] * count
    return f"{match[1] or ''}[{', '.join(texts)}]"


def split(text: str) -> list[str]:
    """Splits at the commas that are within no brackets or strings."""
    parts, depth, start, quote = [], 0, 0, ""
    for index, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    rest = text[start:].strip()
    return [*parts, rest] if rest else parts


def wrapped(code: str, indent: int) -> list[str]:
    """Returns a statement as lines of at most WIDTH characters: a long bracket has one part on each line."""
    line = " " * indent + code
    if len(line) <= WIDTH:
        return [line]
    best = None
    depth, start, quote = 0, 0, ""
    for index, letter in enumerate(code):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            if depth == 0:
                start = index
            depth += 1
        elif letter in ")]}":
            depth -= 1
            if depth == 0 and index - start > 2 and (best is None or index - start >= best[1] - best[0]):
                best = (start, index)
    if best is None:
        return [line]
    start, end = best
    inner = split(code[start + 1 : end])
    if not inner or (len(inner) == 1 and " for " not in inner[0] and "(" not in inner[0]):
        return [line]
    lines = [" " * indent + code[: start + 1]]
    joined = " " * (indent + 4) + ", ".join(inner)
    if len(joined) <= WIDTH and len(inner) > 0 and code[start] != "[":
        lines.append(joined)
    else:
        for part in inner:
            lines += wrapped(f"{part}," if len(inner) > 1 else part, indent + 4)
    lines.append(" " * indent + code[end:])
    return lines


def zeros(array: Array) -> str:
    shape = ", ".join(map(str, array.tensor.shape))
    comma = "," if len(array.tensor.shape) == 1 else ""
    dtype = mlx_dtype(array.tensor.dtype)
    return f"mx.zeros(({shape}{comma}){'' if dtype == 'float32' else f', mx.{dtype}'})"
