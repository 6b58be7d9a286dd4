"""One class for two variants of an original class, of which one has further layers: a block with a downsampling."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from icenet.core.porting.source.lines import Body, Line

OPEN = "§"
"""A number that an instance does not have, because it lacks the line."""

_Masked = Callable[[str], str]
_Parts: TypeAlias = "tuple[list[str], list[Body]]"
"""The statements of the constructor, and the methods."""
_ATTRIBUTE = re.compile(r"self\.(\w+) = ")


@dataclass
class _Row:
    """A statement of the class of both: its place in the smaller and in the larger variant, or a text."""

    small: int | None = None
    large: int | None = None
    text: str = ""
    depth: int = 0
    """How much deeper it stands than in its variant."""
    suffix: str = ""


@dataclass
class Union:
    """How the statements of two variants become those of one class.

    Attributes:
        init: The statements of the constructor.
        bodies: Those of the methods.
        examples: An instance of each variant, the smaller one first.
    """

    init: list[_Row]
    bodies: list[list[_Row]]
    examples: tuple[_Parts, _Parts]

    def written(self, init: list[str], bodies: list[Body], is_large: bool, masked: _Masked) -> _Parts:
        """Returns constructor and methods of an instance as the class of both has them, with its own numbers."""
        other_init, other_bodies = self.examples[0 if is_large else 1]
        lines = []
        for row in self.init:
            own = row.large if is_large else row.small
            if row.text:
                lines.append(str(is_large).join(row.text.split("?")))
            else:
                other = row.small if is_large else row.large
                assert other is not None or own is not None
                text = init[own] if own is not None else masked(other_init[other or 0])
                lines.append("    " * row.depth + text)
        made = []
        for number, rows in enumerate(self.bodies):
            found = []
            for row in rows:
                if row.text:
                    found.append(Line(row.text, "", row.depth))
                    continue
                own, other = (row.large, row.small) if is_large else (row.small, row.large)
                line = bodies[number].lines[own] if own is not None else other_bodies[number].lines[other or 0]
                code = line.code if own is not None else masked(line.code)
                comment = line.comment if row.depth == 0 else ""
                found.append(Line(code + row.suffix, comment, line.depth + row.depth))
            made.append(Body(bodies[number].parameters, found, bodies[number].returns))
        return lines, made


def union(a: _Parts, b: _Parts, masked: _Masked) -> tuple[Union, bool] | None:
    """Returns the class of two variants, and whether the first is the larger one; None if there is none.

    Args:
        a, b: Constructor and methods of an instance of each variant.
        masked: Returns a text with a mark in the place of each number.
    """
    found = _union(a, b, masked)
    if found is not None:
        return found, False
    found = _union(b, a, masked)
    return (found, True) if found is not None else None


def _union(small: _Parts, large: _Parts, masked: _Masked) -> Union | None:
    places = _places([*map(masked, small[0])], [*map(masked, large[0])])
    if places is None or len(small[1]) != len(large[1]):
        return None
    further = [index for index, place in enumerate(places) if place is None]
    matches = [_ATTRIBUTE.match(large[0][index]) for index in further]
    names = [match[1] for match in matches if match]
    if not names or len(names) < len(matches):
        return None
    init: list[_Row] = []
    for index, place in enumerate(places):
        if place is None and (index == 0 or places[index - 1] is not None):
            init.append(_Row(text="if ?:"))
        init.append(_Row(place, index, depth=int(place is None)))
    bodies = []
    for one, other in zip(small[1], large[1], strict=True):
        if one.parameters != other.parameters:
            return None
        rows = _rows(one.lines, other.lines, names[0], masked)
        bodies.append(rows)
    return Union(init, bodies, (small, large))


def _places(small: list[str], large: list[str]) -> list[int | None] | None:
    """Returns the place in the smaller constructor of each statement of the larger one; None if it lacks some."""
    found: list[int | None] = []
    at = 0
    for text in large:
        if at < len(small) and text == small[at]:
            found.append(at)
            at += 1
        else:
            found.append(None)
    return found if at == len(small) else None


def _rows(small: list[Line], large: list[Line], name: str, masked: _Masked) -> list[_Row]:
    """Returns the statements of a method: those of one variant only are in branches."""
    ours, theirs = _statements(small), _statements(large)
    keys = [
        [tuple((lines[index].depth, masked(lines[index].code)) for index in part) for part in parts]
        for lines, parts in ((small, ours), (large, theirs))
    ]
    rows: list[_Row] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_opcodes():
        one = [index for part in ours[a:b] for index in part]
        other = [index for part in theirs[c:d] for index in part]
        if kind == "equal":
            rows += [_Row(i, j) for i, j in zip(one, other, strict=True)]
            continue
        variable = _chosen([small[i] for i in one], [large[j] for j in other], masked)
        if variable:
            rows.append(_Row(None, other[0], suffix=f' if "{name}" in self else {variable}'))
            rows += [_Row(None, j) for j in other[1:]]
            continue
        if other:
            rows += [_Row(text=f'if "{name}" in self:'), *(_Row(None, j, depth=1) for j in other)]
        if one:
            head = "else:" if other else f'if "{name}" not in self:'
            rows += [_Row(text=head), *(_Row(i, None, depth=1) for i in one)]
    return rows


def _chosen(small: list[Line], large: list[Line], masked: _Masked) -> str:
    """Returns the variable that the smaller variant reads in the place of what the first statement computes."""
    match = re.match(r"(\w+) = ", large[0].code) if large else None
    if match is None or any(line.depth for line in (*small, *large)) or len(large) != len(small) + 1 or not small:
        return ""
    ours, theirs = (re.findall(r"\w+|\W", "\n".join(line.code for line in part)) for part in (small, large[1:]))
    if len(ours) != len(theirs) or match[1] in ours or masked("".join(ours)) != "".join(ours):
        return ""
    pairs = {(a, b) for a, b in zip(ours, theirs, strict=True) if a != b}
    if len(pairs) != 1:
        return ""
    a, b = pairs.pop()
    return a if b == match[1] and a.isidentifier() else ""


def _statements(lines: list[Line]) -> list[list[int]]:
    """Returns the places of the lines of each statement."""
    found: list[list[int]] = []
    for index, line in enumerate(lines):
        if (line.depth == 0 and line.code != "else:") or not found:
            found.append([index])
        else:
            found[-1].append(index)
    return found
