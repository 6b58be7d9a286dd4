"""One class for instances whose texts differ in numbers: the numbers become arguments of its constructor."""

from __future__ import annotations

import itertools
import re
from typing import Any

from icenet.core.porting.source.instances import NUMBER, Class, Instance
from icenet.core.porting.source.lines import Body, Line
from icenet.core.porting.source.structure import METHODS
from icenet.core.porting.source.variants import OPEN

Column = tuple[str, ...]
"""The numbers that the instances have at one place of their texts."""


class Unification:
    """The class of some instances whose texts differ in numbers.

    Places of numbers are counted over the whole text of an instance: its constructor, then its methods.

    Args:
        name: The name of the class.
        members: The instances.
        names: The names of the arguments of known classes, by the name of the class.
    """

    def __init__(self, name: str, members: list[Instance], names: dict[str, list[str]]) -> None:
        self.name, self.members, self.first = name, members, members[0]
        self.columns: list[Column] = list(zip(*(NUMBER.findall(item.text) for item in members), strict=True))
        self.in_init = len(NUMBER.findall("\n".join(self.first.init)))
        self.taken = {*re.findall(r"self\.(\w+)", self.first.text), *METHODS}
        self.suggested = hints(self.first.text, names)
        self.parameters: dict[Column, str] = {}
        """The parameters of the constructor by the numbers that the instances give to them."""
        self.flags: set[str] = set()
        """The parameters that say whether an instance has a layer."""
        self.attributes: dict[str, None] = {}
        """The parameters that the methods read."""
        self.replacement: dict[int, str] = {}
        """What replaces the number at a place."""

    def result(self) -> tuple[Class, list[list[str]]]:
        """Returns the class, and the arguments of each instance."""
        varying = [index for index, column in enumerate(self.columns) if len(set(column)) > 1]
        # numbers that some instances lack come last: they are those of other parameters
        varying.sort(key=lambda index: OPEN in self.columns[index])
        known = _known_numbers(self.members, self.in_init, self.taken)
        known = {index: key for index, key in known.items() if index not in varying}
        if not varying and not known:
            return Class(self.name, self.first.init, _common_comments(self.members)), [[] for _ in self.members]
        for index in varying:
            self._replace(index)
        values = {key: self.columns[index][0] for index, key in known.items() if key not in self.taken}
        self.replacement |= {index: f"self.{key}" for index, key in known.items() if key in values}
        init, bodies = self._written()
        attributes = [
            *(f"self.{name} = {name}" for name in self.attributes),
            *(f"self.{name} = {value}" for name, value in values.items()),
        ]
        parameters, arguments = self._parameters_and_arguments()
        return Class(self.name, [*attributes, *init], bodies, parameters), arguments

    def _replace(self, index: int) -> None:
        """Replaces the number at a place by a parameter."""
        column, form = self.columns[index], "{}"
        if OPEN in column:
            like = _compatible(column, self.suggested[index], self.parameters)
            if like is None and len({*column} - {OPEN}) == 1:
                self.replacement[index] = next(value for value in column if value != OPEN)
                return
            column = like or tuple("None" if value == OPEN else value for value in column)
        if column not in self.parameters:
            attribute = _attribute(column, self.members, self.taken)
            formula = _formula(column, self.members) if not attribute and index >= self.in_init else None
            if formula is not None:
                attribute, column, form = formula
            if column not in self.parameters:
                self._add_parameter(column, attribute, self.suggested[index])
        parameter = self.parameters[column]
        if index < self.in_init:
            self.replacement[index] = parameter
        else:
            self.attributes[parameter] = None
            self.replacement[index] = form.format(f"self.{parameter}")

    def _add_parameter(self, column: Column, attribute: str, suggested: str) -> None:
        """Adds a parameter with the name of an attribute of the original, or with the one that is suggested."""
        is_flag = suggested.endswith("?")
        hint = attribute if attribute and attribute not in self.taken else suggested.removesuffix("?")
        name, number = hint, 1
        while name in self.taken and not is_flag:
            number += 1
            name = f"{hint}_{number}"
        self.taken.add(name)
        self.parameters[column] = name
        if is_flag:
            self.flags.add(name)

    def _written(self) -> tuple[list[str], list[Body]]:
        """Returns the constructor and the methods with the replacements, and the comments that all instances have."""
        places = itertools.count()

        def put(match: re.Match[str]) -> str:
            return self.replacement.get(next(places), match[0])

        init = [NUMBER.sub(put, line) for line in self.first.init]
        bodies = []
        for body in _common_comments(self.members):
            lines = [Line(NUMBER.sub(put, line.code), line.comment, line.depth) for line in body.lines]
            bodies.append(Body(body.parameters, lines, body.returns))
        return init, bodies

    def _parameters_and_arguments(self) -> tuple[list[str], list[list[str]]]:
        """Returns the parameters with their defaults, those without one first, and the arguments of each instance."""
        flags = {name: column for column, name in self.parameters.items() if name in self.flags}
        others = {name: column for column, name in self.parameters.items() if name not in self.flags}
        optional = {name: column for name, column in others.items() if "None" in column}
        required = {name: column for name, column in others.items() if "None" not in column}
        parameters = [*required, *(f"{name}=None" for name in optional), *(f"{name}=False" for name in flags)]
        arguments = [
            [
                *(column[row] for column in required.values()),
                *(f"{name}={column[row]}" for name, column in optional.items() if column[row] != "None"),
                *(f"{name}=True" for name, column in flags.items() if column[row] == "True"),
            ]
            for row in range(len(self.members))
        ]
        return parameters, arguments


_SIZE = re.compile(
    r"head|dim|size|channel|emb|window|group|patch|hidden|scal|feature|width|state|rank|length|^(d|n|num)_|_(d|n)$"
)
"""Words in the names of attributes that are sizes or a scale."""
_USES_SIZES = re.compile(r"\.reshape\([^()]*$|\bscale=$")
"""What stands before the sizes of a shape, or a scale."""


def _known_numbers(members: list[Instance], start: int, taken: set[str]) -> dict[int, str]:
    """Returns the attribute of the original that has a number of a shape or a scale in the methods, by its place."""
    found = {}
    text = members[0].text
    for index, match in enumerate(NUMBER.finditer(text)):
        before, after = text[: match.start()].rpartition("\n")[2], text[match.start() :].partition("\n")[0]
        if index < start or match[0] in ("1", "0", "1.0", OPEN) or not _USES_SIZES.search(before):
            continue
        shape = re.split(r"[()]", before)[-1] + re.split(r"[()]", after)[0]
        if len(re.findall(rf"(?<![\w.]){re.escape(match[0])}(?![\w.])", shape)) > 1:
            continue  # one of them may have another meaning
        attribute = _attribute((match[0],) * len(members), members, taken)
        if _SIZE.search(attribute):
            found[index] = attribute
    return found


def _attribute(column: tuple[str, ...], members: list[Instance], taken: set[str]) -> str:
    """Returns the only attribute of the original that has the numbers of a column, empty without one."""
    found = [
        name
        for name in members[0].settings
        if all(repr(item.settings.get(name)) == value for item, value in zip(members, column, strict=True))
    ]
    return found[0] if len(found) == 1 and found[0] not in taken and not found[0].startswith("_") else ""


def _formula(column: tuple[str, ...], members: list[Instance]) -> tuple[str, tuple[str, ...], str] | None:
    """Returns the only attribute x for which the numbers of a column are -x or 1 - x; None without one.

    Returns:
        The attribute, its numbers, and how a number is written with it, such as "(1 - {})".
    """
    found = []
    for name in members[0].settings:
        values: list[Any] = [item.settings.get(name) for item in members]
        if name.startswith("_") or any(type(value) not in (int, float) for value in values):
            continue
        rests = [1 - value if type(value) is float else None for value in values]
        for form, numbers in (("-{}", [-value for value in values]), ("(1 - {})", rests)):
            if tuple(map(repr, numbers)) == column:
                found.append((name, tuple(map(repr, values)), form))
    return found[0] if len(found) == 1 else None


def _compatible(column: tuple[str, ...], hint: str, parameters: dict[tuple[str, ...], str]) -> tuple[str, ...] | None:
    """Returns the column of a parameter with the numbers of a column that some instances lack, None without one."""
    found = [
        other for other in parameters if all(value in (OPEN, mine) for value, mine in zip(column, other, strict=True))
    ]
    named = [other for other in found if re.fullmatch(rf"(\w+_)?{hint}(_\d+)?", parameters[other])]
    return named[0] if named else found[0] if found and len({*column} - {OPEN}) > 1 else None


def _common_comments(members: list[Instance]) -> list[Body]:
    """Returns the bodies of the first instance with the comments that all instances have."""
    bodies = []
    for number, body in enumerate(members[0].bodies):
        others = [item.bodies[number].lines for item in members[1:]]
        lines = [
            Line(
                line.code,
                line.comment if all(other[row].comment == line.comment for other in others) else "",
                line.depth,
            )
            for row, line in enumerate(body.lines)
        ]
        bodies.append(Body(body.parameters, lines, body.returns))
    return bodies


def hints(text: str, known: dict[str, list[str]]) -> list[str]:
    """Returns a name for each number of a text: its keyword, or the argument of the constructor."""
    names: list[str] = []
    for match in NUMBER.finditer(text):
        before = text[: match.start()].rpartition("\n")[2]
        found = re.search(r"(\w+)=\(?(?:\d+, )*$", before)
        attribute = re.match(r"self\.(\w+) = ", before)
        hint = ""
        if before == "if ":  # the condition of a layer that some instances lack
            layer = re.match(r":\n +self\.(\w+)", text[match.end() :])
            hint = f"{layer[1]}?" if layer else "flag?"
        elif found:
            hint = found[1]
        else:
            opened = re.search(r"([\w.]+)\(([^()]*)$", before)
            if opened and opened[1] in known:
                arguments = known[opened[1]]
                place = opened[2].count(",")
                hint = arguments[place] if place < len(arguments) else ""
            elif opened and opened[1] in ("range",):
                hint = "num_layers"
            elif attribute:
                hint = "dims" if attribute[1] in ("weight", "bias") else f"{attribute[1]}_size"
        if not hint and "reshape(" in before:
            hint = "size"
        hint = hint or "value"
        names.append({"num_features": "channels", "axis": "axis"}.get(hint, hint))
    return names
