"""One class for instances whose texts differ in numbers: the numbers become arguments of its constructor."""

from __future__ import annotations

import itertools
import re
from typing import Any

from icenet.core.porting.source.constructors import Constructors, Solution
from icenet.core.porting.source.instances import NUMBER, Class, Instance
from icenet.core.porting.source.known_numbers import attribute_of, formula_of, is_size, known_formulas, known_numbers
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
        constructors: Those of the original.
        is_whole: Whether it is the class of the whole module, whose arguments have defaults.
    """

    def __init__(
        self,
        name: str,
        members: list[Instance],
        names: dict[str, list[str]],
        constructors: Constructors,
        is_whole: bool = False,
    ) -> None:
        self.constructors, self.is_whole, self.solution = constructors, is_whole, Solution()
        self.settings = [item.settings for item in members]
        self.name, self.members, self.first = name, members, members[0]
        self.columns: list[Column] = list(zip(*(NUMBER.findall(item.text) for item in members), strict=True))
        self.in_init = len(NUMBER.findall("\n".join(self.first.init)))
        self.taken = {*re.findall(r"self\.(\w+)", self.first.text), *METHODS}
        self.existing = set(self.taken)
        """What the class has as attributes."""
        self.suggested = hints(self.first.text, names)
        self.parameters: dict[Column, str] = {}
        """The parameters of the constructor by the numbers that the instances give to them."""
        self.flags: set[str] = set()
        """The parameters that say whether an instance has a layer."""
        self.attributes: dict[str, str] = {}
        """The parameters that the methods read, by the names of attributes."""
        self.replacement: dict[int, str] = {}
        """What replaces the number at a place."""

    def result(self) -> tuple[Class, list[list[str]]]:
        """Returns the class, and the arguments of each instance."""
        varying = [index for index, column in enumerate(self.columns) if len(set(column)) > 1]
        # numbers that some instances lack come last: they are those of other parameters
        varying.sort(key=lambda index: OPEN in self.columns[index])
        origins = self._origins()
        numbers = known_numbers(self.first.text, self.in_init, self.settings, self.taken, origins)
        formulas = known_formulas(self.first.text, self.in_init, self.columns, self.settings, origins)
        known = {index: key for index, key in numbers.items() if index not in varying}
        in_methods = [
            attribute_of(self.columns[index], self.settings, self.existing)
            for index in varying
            if index >= self.in_init
        ]
        in_formulas = [key for index, (_, keys) in formulas.items() if index not in known for key in keys]
        self._solve([key for key in dict.fromkeys([*known.values(), *in_methods, *in_formulas]) if key])
        attributes_of = self.solution.attributes
        known = {index: key for index, key in known.items() if is_size(key) or key in attributes_of}
        if not varying and not known and not self.solution.arguments:
            return Class(self.name, self.first.init, _common_comments(self.members)), [[] for _ in self.members]
        self.replacement |= {
            index: formula
            for index, (formula, keys) in formulas.items()
            if index not in known and all(key in attributes_of for key in keys)
        }
        for index in varying:
            if index not in self.replacement:
                self._replace(index)
        is_free = {key: key in attributes_of or key not in self.taken for key in known.values()}
        values = {key: self.columns[index][0] for index, key in known.items() if is_free[key]}
        self.replacement |= {index: f"self.{key}" for index, key in known.items() if key in values}
        init, bodies = self._written()
        further = {name: value for name, value in {**self.attributes, **values}.items() if name not in attributes_of}
        attributes = [*self.solution.statements, *(f"self.{name} = {value}" for name, value in further.items())]
        parameters, arguments = self._parameters_and_arguments()
        return Class(self.name, [*attributes, *init], bodies, parameters, self.solution.keys), arguments

    def _origins(self) -> list[Any]:
        """Returns the statements of the original that led to each line of the text, None if they are not known."""
        rows = [line for body in self.first.bodies for line in (None, *body.lines)]  # None for the parameters
        origins = [line.origin if line is not None else None for line in rows]
        return [*[None] * (len(self.first.init) + 1), *origins]

    def _solve(self, read: list[str]) -> None:
        """Replaces numbers of the constructor by the expressions of the original.

        Args:
            read: The attributes that methods read.
        """
        lines: list[str] = []
        places: dict[tuple[int, int], tuple[int, Column]] = {}
        count = itertools.count()
        for row, texts in enumerate(zip(*(item.init for item in self.members), strict=True)):
            lines.append(next((text for text in texts if OPEN not in text), ""))
            starts = [match.start() for match in NUMBER.finditer(lines[-1])]
            for place, _ in enumerate(NUMBER.finditer(texts[0])):
                index = next(count)
                if place < len(starts):
                    places[row, starts[place]] = index, self.columns[index]
        self.solution = self.constructors.solved(self.name, self.first, lines, places, self.settings, read)
        self.replacement = dict(self.solution.expressions)
        self.parameters = {column: name for name, column in self.solution.arguments.items()}
        self.taken |= {*self.solution.arguments}

    def _solved_like(self, column: Column) -> str:
        """Returns the expression of another number that each instance has at a place, empty without one."""
        if len({*column} - {OPEN}) < 2:
            return ""
        found = [
            text
            for place, text in self.solution.expressions.items()
            if all(value in (OPEN, other) for value, other in zip(column, self.columns[place], strict=True))
        ]
        return min(found, key=len, default="")

    def _replace(self, index: int) -> None:
        """Replaces the number at a place by a parameter."""
        column, form = self.columns[index], "{}"
        attribute = attribute_of(column, self.settings, self.existing)
        if index >= self.in_init and attribute in self.solution.attributes:
            self.replacement[index] = f"self.{attribute}"
            return
        equal = self._solved_like(column) if index < self.in_init and column not in self.parameters else ""
        if equal:
            self.replacement[index] = equal
            return
        if OPEN in column:
            like = _compatible(column, self.suggested[index], self.parameters)
            if like is None and len({*column} - {OPEN}) == 1:
                self.replacement[index] = next(value for value in column if value != OPEN)
                return
            column = like or tuple("None" if value == OPEN else value for value in column)
        if column not in self.parameters:
            attribute = attribute_of(column, self.settings, self.taken)
            formula = formula_of(column, self.settings) if not attribute and index >= self.in_init else None
            if formula is not None:
                attribute, column, form = formula
            if column not in self.parameters:
                self._add_parameter(column, attribute, self.suggested[index])
        parameter = self.parameters[column]
        if index < self.in_init:
            self.replacement[index] = parameter
        else:
            attribute = f"{parameter}_value" if parameter in self.existing else parameter
            self.attributes[attribute] = parameter
            self.replacement[index] = form.format(f"self.{attribute}")

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
            for text in body.parameters:
                NUMBER.sub(put, text)  # the defaults stay, but have places: `use_cache=False`
            lines = [Line(NUMBER.sub(put, line.code), line.comment, line.depth) for line in body.lines]
            bodies.append(Body(body.parameters, lines, body.returns))
        return init, bodies

    def _parameters_and_arguments(self) -> tuple[list[str], list[list[str]]]:
        """Returns the parameters with their defaults, those without one first, and the arguments of each instance."""
        given, defaults = self.solution.arguments, self.solution.defaults
        fixed = {name: column[0] for name, column in given.items() if self.is_whole or name in defaults}
        flags = {name: column for column, name in self.parameters.items() if name in self.flags}
        others = {name: column for column, name in self.parameters.items() if name not in (*self.flags, *given)}
        others = {**{name: column for name, column in given.items() if name not in fixed}, **others}
        optional = {name: column for name, column in others.items() if "None" in column}
        required = {name: column for name, column in others.items() if "None" not in column}
        default = {**fixed, **dict.fromkeys(optional, "None"), **dict.fromkeys(flags, "False")}
        parameters = [*required, *(f"{name}={value}" for name, value in default.items())]
        arguments = [
            [
                *(column[row] for column in required.values()),
                *(f"{name}={column[row]}" for name, column in optional.items() if column[row] != "None"),
                *(f"{name}=True" for name, column in flags.items() if column[row] == "True"),
            ]
            for row in range(len(self.members))
        ]
        return parameters, arguments


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
        before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
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
            elif opened and opened[1] == "range":
                hint = "num_layers"
            elif attribute:
                hint = "dims" if attribute[1] in ("weight", "bias") else f"{attribute[1]}_size"
        if not hint and "reshape(" in before:
            hint = "size"
        hint = hint or "value"
        names.append("channels" if hint == "num_features" else hint)
    return names
