"""One class for two variants of an original class: a block with a downsampling, or an attention over other states."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from icenet.core.porting.source.lines import Body, Line

OPEN = "§"
"""A number that an instance does not have, because it lacks the line."""

_Masked = Callable[[str], str]
_Parts: TypeAlias = "tuple[list[str], list[Body]]"
"""The statements of the constructor, and the methods."""
_ATTRIBUTE = re.compile(r"self\.(\w+) = ")


@dataclass(frozen=True)
class Condition:
    """What is true of the larger of two variants only, as the constructor and the methods write it.

    Attributes:
        init: The source in the constructor, with "?" in the place of a boolean.
        method: The source in the methods.
        otherwise: The source of its opposite.
    """

    init: str
    method: str
    otherwise: str


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
        parameters: The parameters of each method.
    """

    init: list[_Row]
    bodies: list[list[_Row]]
    examples: tuple[_Parts, _Parts]
    parameters: list[list[str]] = field(default_factory=list)

    def written(self, init: list[str], bodies: list[Body], is_large: bool, masked: _Masked) -> _Parts:
        """Returns constructor and methods of an instance as the class of both has them, with its own numbers."""
        other_init, other_bodies = self.examples[0 if is_large else 1]
        lines = []
        for row in self.init:
            own, other = (row.large, row.small) if is_large else (row.small, row.large)
            if row.text:
                lines.append(str(is_large).join(row.text.split("?")))
            else:
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
                found.append(Line(code + row.suffix, comment, line.depth + row.depth, line.origin))
            made.append(Body(self.parameters[number], found, bodies[number].returns))
        return lines, made


def union(a: _Parts, b: _Parts, masked: _Masked) -> tuple[Union, bool] | None:
    """Returns the class of two variants of which one has further layers, and whether the first is that one.

    Args:
        a, b: Constructor and methods of an instance of each variant.
        masked: Returns a text with a mark in the place of each number.

    Returns:
        None if neither has all statements of the other's constructor.
    """
    found = _with_layers(a, b, masked)
    if found is not None:
        return found, False
    found = _with_layers(b, a, masked)
    return (found, True) if found is not None else None


def _with_layers(small: _Parts, large: _Parts, masked: _Masked) -> Union | None:
    places = _places([*map(masked, small[0])], [*map(masked, large[0])])
    if places is None:
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
    return _union(small, large, masked, init, Condition("?", f'"{names[0]}" in self', f'"{names[0]}" not in self'))


def with_flag(small: _Parts, large: _Parts, masked: _Masked, flag: str) -> Union | None:
    """Returns the class of two variants that an attribute distinguishes: it is true in the larger one only."""
    condition = Condition("?", f"self.{flag}", f"not self.{flag}")
    ours, theirs = ([[index] for index in range(len(part[0]))] for part in (small, large))
    keys = [[masked(text) for text in part[0]] for part in (small, large)]
    init = _branches(ours, theirs, keys[0], keys[1], condition.init, f"not {condition.init}")
    return _union(small, large, masked, init, condition)


def with_argument(small: _Parts, large: _Parts, masked: _Masked) -> Union | None:
    """Returns the class of two variants of which the methods of the larger one take a further argument."""
    if [*map(masked, small[0])] != [*map(masked, large[0])]:
        return None
    further = [name for one, other in zip(small[1], large[1], strict=False) for name in other.names[len(one.names) :]]
    if not further or any("=" in text for body in large[1] for text in body.parameters if text[:1] == further[0]):
        return None
    name = further[0]
    if any(text.startswith(f"{name}=") for body in (*small[1], *large[1]) for text in body.parameters):
        return None  # it is given to some instances of the larger variant only
    init = [_Row(index, index) for index in range(len(small[0]))]
    made = _union(small, large, masked, init, Condition("?", f"{name} is not None", f"{name} is None"))
    return made if made is not None and not _is_set_before(made, name) else None


def _is_set_before(made: Union, name: str) -> bool:
    """Returns whether a method gives an argument a value before it decides on it."""
    sets = re.compile(rf"(?:for )?(?:[^=(]*\W)?{name}\b[^=(]*(?: = | in )")
    for number, rows in enumerate(made.bodies):
        is_set = False
        for row in rows:
            if is_set and f"{name} is " in row.text + row.suffix:
                return True
            for place, (_, bodies) in zip((row.small, row.large), made.examples, strict=True):
                is_set |= place is not None and sets.match(bodies[number].lines[place].code) is not None
    return False


def _union(small: _Parts, large: _Parts, masked: _Masked, init: list[_Row], condition: Condition) -> Union | None:
    if len(small[1]) != len(large[1]):
        return None
    bodies, parameters = [], []
    for one, other in zip(small[1], large[1], strict=True):
        given = _parameters(one, other)
        if given is None:
            return None
        parameters.append(given)
        bodies.append(_rows(one.lines, other.lines, condition, masked))
    return Union(init, bodies, (small, large), parameters)


def _parameters(small: Body, large: Body) -> list[str] | None:
    """Returns the parameters of the method of both; None if those of one are no beginning of those of the other.

    Calls give arguments by their places.
    """
    shorter, longer = sorted((small, large), key=lambda body: len(body.names))
    if longer.names[: len(shorter.names)] != shorter.names:
        return None
    optional = {text.partition("=")[0] for body in (small, large) for text in body.parameters if "=" in text}
    optional |= {*longer.names[len(shorter.names) :]}
    return [f"{name}=None" if name in optional else name for name in longer.names]


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


def _rows(small: list[Line], large: list[Line], condition: Condition, masked: _Masked) -> list[_Row]:
    """Returns the statements of a method: those of one variant only are in branches."""
    ours, theirs = _statements(small), _statements(large)
    keys = [
        [tuple((lines[index].depth, masked(lines[index].code)) for index in part) for part in parts]
        for lines, parts in ((small, ours), (large, theirs))
    ]

    def joined(one: list[int], other: list[int]) -> list[_Row]:
        ours, theirs = [small[i] for i in one], [large[j] for j in other]
        variable = _chosen(ours, theirs, masked)
        if variable:
            first = _Row(None, other[0], suffix=f" if {condition.method} else {variable}")
            return [first, *(_Row(None, j) for j in other[1:])]
        if _is_otherwise(ours, theirs, masked):
            head = f"{theirs[0].code.removesuffix(':')} and {condition.method}:"
            return [_Row(text=head), *(_Row(None, j) for j in other[1:])]
        return []

    return _branches(ours, theirs, keys[0], keys[1], condition.method, condition.otherwise, joined)


def _branches(
    ours: list[list[int]],
    theirs: list[list[int]],
    our_keys: list[Any],
    their_keys: list[Any],
    condition: str,
    otherwise: str,
    joined: Callable[[list[int], list[int]], list[_Row]] = lambda one, other: [],
) -> list[_Row]:
    """Returns the statements of both variants, with branches around those that one of them lacks.

    Args:
        ours, theirs: The lines of each statement of the smaller and of the larger variant.
        our_keys, their_keys: What equal statements have in common.
        condition, otherwise: What is true of the larger variant, and of the smaller one.
        joined: Returns statements of both that say the same without further branches; empty if there are none.
    """
    rows: list[_Row] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, our_keys, their_keys, autojunk=False).get_opcodes():
        one = [index for part in ours[a:b] for index in part]
        other = [index for part in theirs[c:d] for index in part]
        if kind == "equal":
            rows += [_Row(i, j) for i, j in zip(one, other, strict=True)]
            continue
        both = joined(one, other)
        if both:
            rows += both
            continue
        if other:
            rows += [_Row(text=f"if {condition}:"), *(_Row(None, j, depth=1) for j in other)]
        if one:
            head = "else:" if other else f"if {otherwise}:"
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


def _is_otherwise(small: list[Line], large: list[Line], masked: _Masked) -> bool:
    """Returns whether the statements of the smaller variant are the `else` of the larger one's only statement."""
    heads = [index for index, line in enumerate(large) if line.depth == 0]
    if len(heads) != 2 or not large[0].code.startswith("if ") or large[heads[1]].code != "else:":
        return False
    rest = [(line.depth - 1, line.code) for line in large[heads[1] + 1 :]]
    is_plain = all(masked(code) == code for code in (large[0].code, *(code for _, code in rest)))
    return is_plain and rest == [(line.depth, line.code) for line in small] and " or " not in large[0].code


def _statements(lines: list[Line]) -> list[list[int]]:
    """Returns the places of the lines of each statement."""
    found: list[list[int]] = []
    for index, line in enumerate(lines):
        if (line.depth == 0 and line.code != "else:") or not found:
            found.append([index])
        else:
            found[-1].append(index)
    return found
