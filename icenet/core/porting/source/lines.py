"""Statements of a source as text: their lines, brackets and lists."""

from __future__ import annotations

import ast
import itertools
import keyword
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from icenet.core.porting.record import Array
from icenet.core.porting.table.base import mlx_dtype

WIDTH = 112
"""Longest line."""
_SHORT = 30
"""Longest part of a statement with several variables."""
_TUPLE = 88
"""Longest statement with several variables."""

RESERVED = {
    *keyword.kwlist,
    *("mx", "nn", "math", "np", "self", "layer"),
    *("abs", "all", "any", "bool", "dict", "enumerate", "float", "int", "len", "list", "max", "min", "print"),
    *("range", "reversed", "round", "slice", "sum", "super", "tuple", "zip"),
}
"""Words that are no variable."""


@dataclass
class Line:
    """One statement, and a comment about its shape."""

    code: str
    comment: str = ""
    depth: int = 0
    origin: Any = None
    """The statements of the original that led to it, None if they are not known."""


@dataclass
class Body:
    """The text of one call of a module."""

    parameters: list[str]
    lines: list[Line]
    returns: list[str]
    """The names of the values that it returns."""

    @property
    def names(self) -> list[str]:
        """The names of the parameters, without defaults."""
        return [text.partition("=")[0] for text in self.parameters]

    def key(self) -> str:
        """Returns the text without comments, by which equal bodies are found."""
        return "\n".join([", ".join(self.parameters), *("    " * line.depth + line.code for line in self.lines)])


def tuples(lines: list[Line], targets: dict[Any, tuple[str, ...]]) -> list[Line]:
    """Joins the parts of a statement of the original with several variables: `q, k, v = qkv[0], qkv[1], qkv[2]`.

    Args:
        lines: The statements.
        targets: The variables of each statement of the original, by what `Line.origin` has.
    """
    found: list[Line] = []
    index = 0
    while index < len(lines):
        count = len(targets.get(lines[index].origin, ()))
        part = lines[index : index + count]
        pairs = [line.code.split(" = ", 1) for line in part]
        is_plain = all(len(pair) == 2 and pair[0].isidentifier() and len(pair[1]) <= _SHORT for pair in pairs)
        names = [pair[0] for pair in pairs]
        wanted = list(targets.get(lines[index].origin, ()))
        if count < 2 or not is_plain or [re.sub(r"_\d+$", "", name) for name in names] != wanted:
            found.append(lines[index])
            index += 1
            continue
        same = all(line.origin == part[0].origin and line.depth == part[0].depth for line in part)
        code = f"{', '.join(names)} = {', '.join(pair[1] for pair in pairs)}"
        set_before = [set(names[:number]) & set(re.findall(r"\w+", pair[1])) for number, pair in enumerate(pairs)]
        if not same or any(set_before) or len(code) > _TUPLE:
            found.append(lines[index])
            index += 1
            continue
        comments = {line.comment for line in part}
        found.append(replace(part[0], code=code, comment=comments.pop() if len(comments) == 1 else ""))
        index += count
    return found


def returned(lines: list[Line]) -> list[Line]:
    """Returns several values of a call as they are: `return self.decoder(x)` for `a, b = self.decoder(x)`."""
    if len(lines) < 2 or lines[-1].depth != lines[-2].depth:
        return lines
    names, found, value = lines[-2].code.partition(" = ")
    is_whole = lines[-1].code == f"return {names}" and found and re.fullmatch(r"\w+(, \w+)+", names)
    is_call = value.startswith("self.") and value.endswith(")") and len(split(value)) == 1
    if not is_whole or not is_call:
        return lines
    return [*lines[:-2], replace(lines[-1], code=f"return {value}")]


def lists(line: str) -> str:
    """Writes a list of equal constructors with `range`, also within a dict, and a dict with numbered names."""
    found = re.fullmatch(r"((?:[^\[\]{}]* = )?(?:\w+\()?)\{(.*)\}(\)?)", line)
    if found is not None:
        pairs = [part.partition(": ") for part in split(found[2])]
        return f"{found[1]}{{{_numbered([(key, lists(value)) for key, _, value in pairs])}}}{found[3]}"
    match = re.fullmatch(r"([^\[\]]* = )?([A-Z]\w*\()?\[(.*)\](?(2)\))", line)
    if match is None:
        return line
    target, sequence = match[1] or "", match[2] or ""
    parts = split(match[3])
    runs: list[tuple[str, int]] = []
    for part in parts:
        part = lists(part)
        if runs and runs[-1][0] == part:
            runs[-1] = (part, runs[-1][1] + 1)
        else:
            runs.append((part, 1))
    if len(runs) == 1 and runs[0][1] > 1:
        text = f"{runs[0][0]} for _ in range({runs[0][1]})"
        return f"{target}{sequence}{text})" if sequence else f"{target}[{text}]"
    texts = []
    for part, count in runs:
        texts += [f"*({part} for _ in range({count}))"] if count > 2 else [part] * count
    return f"{target}{sequence}[{', '.join(texts)}]{')' * bool(sequence)}"


def _numbered(pairs: list[tuple[str, str]]) -> str:
    """Returns the elements of a dict: `f"layer_{i}": Layer(8) for i in range(4)` where they are equal."""
    name = re.fullmatch(r"'(\w*?)0'", pairs[0][0]) if pairs else None
    values = {value for _, value in pairs}
    if name is None or len(pairs) < 3 or len(values) > 1:
        return ", ".join(f"{key}: {value}" for key, value in pairs)
    if [key for key, _ in pairs] != [f"'{name[1]}{index}'" for index in range(len(pairs))]:
        return ", ".join(f"{key}: {value}" for key, value in pairs)
    return f'f"{name[1]}{{i}}": {values.pop()} for i in range({len(pairs)})'


def _outside_strings(text: str) -> Iterator[tuple[int, str, int]]:
    """Yields each character that is in no string: its place, itself, and the number of brackets around it."""
    depth, quote = 0, ""
    for index, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
            continue
        if letter in "\"'":
            quote = letter
            continue
        depth -= letter in ")]}"
        yield index, letter, depth
        depth += letter in "([{"


def split(text: str) -> list[str]:
    """Splits at the commas that are within no brackets or strings."""
    parts, start = [], 0
    for index, letter, depth in _outside_strings(text):
        if letter == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    rest = text[start:].strip()
    return [*parts, rest] if rest else parts


def _comprehension(text: str) -> list[str] | None:
    """Returns the element and the `for` of a comprehension, None for other text."""
    try:
        tree = ast.parse(f"[{text}]", mode="eval").body
    except SyntaxError:
        return None
    if not isinstance(tree, ast.ListComp) or not tree.generators:
        return None
    end = tree.elt.end_col_offset or 0
    return [text[: end - 1].strip(), text[end - 1 :].strip()]


_OPERATORS = ((" if ", " else "), (" or ",), (" and ",), (" | ",), (" & ",), (" + ", " - "), (" * ", " / ", " @ "))
"""Operators at which a long expression is split, those that bind least first."""


def _operands(code: str) -> tuple[str, list[str]]:
    """Returns the head of an assignment or `return`, and the operands of its value with their operators.

    No operands if the value is of another kind.
    """
    match = re.match(r"(?:[\w.,\s]+ = |return )(?=\S)", code)
    if match is None:
        return "", []
    value = code[match.end() :]
    outer = [index for index, _, depth in _outside_strings(value) if depth == 0]
    for operators in _OPERATORS:
        places = [index for index in outer if any(value.startswith(item, index) for item in operators)]
        if places and "," not in [value[index] for index in outer] and not value.startswith("lambda "):
            bounds = [0, *places, len(value)]
            return match[0], [value[a:b].strip() for a, b in itertools.pairwise(bounds)]
    return "", []


def wrapped(code: str, indent: int) -> list[str]:
    """Returns a statement as lines of at most WIDTH characters: a long bracket has one part on each line."""
    line = " " * indent + code
    if len(line) <= WIDTH:
        return [line]
    head, operands = _operands(code)
    if operands:
        inside = [part for operand in operands for part in wrapped(operand, indent + 4)]
        return [f"{' ' * indent}{head}(", *inside, " " * indent + ")"]
    best, start = (0, 2), 0
    for index, letter, depth in _outside_strings(code):
        if depth == 0 and letter in "([{":
            start = index
        elif depth == 0 and letter in ")]}" and index - start > 2 and index - start >= best[1] - best[0]:
            best = (start, index)
    start, end = best
    if end - start <= 2:  # no bracket has anything to split
        return [line]
    inner = split(code[start + 1 : end])
    parts = _comprehension(code[start + 1 : end])
    if parts is not None:
        lines = [" " * indent + code[: start + 1]]
        for part in parts:
            lines += wrapped(part, indent + 4)
        return [*lines, " " * indent + code[end:]]
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


def initial(array: Array, fill: float | None) -> str:
    """Returns the source of the initial value of an array.

    Args:
        array: The array.
        fill: The number that all elements of such arrays are in the original, None if they differ.
    """
    shape = ", ".join(map(str, array.tensor.shape))
    shape = f"({shape}{',' if len(array.tensor.shape) == 1 else ''})"
    name = mlx_dtype(array.tensor.dtype)
    dtype = "" if name == "float32" else f", mx.{name}"
    if fill is None and array.kind == "parameter" and "bias" not in array.path:
        if name == "complex64":  # MLX has no random complex numbers
            return f"mx.random.normal({shape}, scale=0.02) + 1j * mx.random.normal({shape}, scale=0.02)"
        if array.tensor.is_floating:
            return f"mx.random.normal({shape}{dtype}, scale=0.02)"
    if fill == 1:
        return f"mx.ones({shape}{dtype})"
    if fill and array.tensor.dtype == "float32":
        fill = float(str(np.float32(fill)))  # 1e-6, not the number that float32 has for it
    return f"mx.full({shape}, {fill}{dtype})" if fill else f"mx.zeros({shape}{dtype})"
