"""One class for instances whose texts differ in numbers: the numbers become arguments of its constructor."""

from __future__ import annotations

import itertools
import re
from typing import Any

from icenet.core.porting.source.constructors import Constructors, Solution
from icenet.core.porting.source.instances import CAUSAL, NUMBER, Class, Instance
from icenet.core.porting.source.known_numbers import attribute_of, formula_of, is_size, known_formulas, known_numbers
from icenet.core.porting.source.lines import Body, Line
from icenet.core.porting.source.structure import METHODS
from icenet.core.porting.source.variants import OPEN

Column = tuple[str, ...]
"""The numbers that the instances have at one place of their texts."""

_NUMBER_SET = re.compile(rf"self\.(\w+) = (?:{NUMBER.pattern})")
"""A statement that sets an attribute to a number of the original."""


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
        self.read = attributes_read(members)
        """The numbers of the original that the methods read as attributes, with those of each instance."""
        self.taken = {*re.findall(r"self\.(\w+)", self.first.text), *METHODS} - self.read.keys()
        self.existing = set(self.taken)
        """What the class has as attributes."""
        self.suggested = hints(self.first.text, names)
        self.parameters: dict[Column, str] = {}
        """The parameters of the constructor by the numbers that the instances give to them."""
        self.keywords = {*re.findall(r"(\w+)=(?:True|False)\b", "\n".join(self.first.init))}
        self.flags: set[str] = set()
        """The parameters that say whether an instance has a layer."""
        self.attributes: dict[str, str] = {}
        """The parameters that the methods read, by the names of attributes."""
        self.replacement: dict[int, str] = {}
        """What replaces the number at a place."""

    def result(self) -> tuple[Class, list[list[str]]]:
        """Returns the class, and the arguments of each instance."""
        varying = [index for index, column in enumerate(self.columns) if len({*column}) > 1]
        # numbers that some instances lack come last: they are those of other parameters
        varying.sort(key=lambda index: OPEN in self.columns[index])
        origins = self._origins()
        text = self._text()
        numbers = known_numbers(text, self.in_init, self.settings, self.taken, origins)
        formulas = known_formulas(text, self.in_init, self.columns, self.settings, origins)
        known = {index: key for index, key in numbers.items() if len({*self.columns[index]} - {OPEN}) == 1}
        in_methods = [
            attribute_of(self.columns[index], self.settings, self.existing)
            for index in varying
            if index >= self.in_init
        ]
        in_formulas = [key for index, (_, keys) in formulas.items() if index not in known for key in keys]
        wanted = [*self.read, *known.values(), *in_methods, *in_formulas]
        self._solve([key for key in dict.fromkeys(wanted) if key])
        attributes_of = self.solution.attributes
        known = {index: key for index, key in known.items() if is_size(key) or key in attributes_of}
        if not varying and not known and not self.read and not self.solution.arguments:
            return Class(self.name, self.first.init, _common_comments(self.members)), [[] for _ in self.members]
        self.replacement |= {
            index: formula
            for index, (formula, keys) in formulas.items()
            if index not in known and all(key in attributes_of for key in keys)
        }
        for index, formula in _widths_of_queries(text).items():
            if index in varying:
                self.replacement.setdefault(index, formula)
        for index in varying:
            if index not in self.replacement and index not in known:
                self._replace(index)
        is_free = {key: key in attributes_of or key not in self.taken for key in known.values()}
        numbers_of = {index: next(value for value in self.columns[index] if value != OPEN) for index in known}
        values = {key: numbers_of[index] for index, key in known.items() if is_free[key]}
        self.replacement |= {index: f"self.{key}" for index, key in known.items() if key in values}
        self._add_attributes()
        init, bodies = self._written()
        further = {name: value for name, value in {**self.attributes, **values}.items() if name not in attributes_of}
        attributes = [*self.solution.statements, *(f"self.{name} = {value}" for name, value in further.items())]
        parameters, arguments = self._parameters_and_arguments()
        masks = {name for column, name in self.parameters.items() if CAUSAL in column}
        made = Class(self.name, [*attributes, *init], bodies, parameters, self.solution.keys, self.flags | masks)
        return made, arguments

    def _text(self) -> str:
        """Returns the text of the first instance, with the numbers of others where it lacks a line."""
        others = [{*column} - {OPEN} for column in self.columns]
        values = (values.pop() if len(values) == 1 else OPEN for values in others)
        pairs = zip(self.columns, values, strict=True)
        numbers = (value if column[0] == OPEN else column[0] for column, value in pairs)
        return NUMBER.sub(lambda _: next(numbers), self.first.text)

    def _add_attributes(self) -> None:
        """Adds parameters for attributes that methods read and of which the original's constructor says no more."""
        for name, column in self.read.items():
            if name in self.solution.attributes or name in self.attributes:
                continue
            if len({*column}) > 1 and column not in self.parameters:
                self._add_parameter(column, name, name)
            self.attributes[name] = self.parameters.get(column, column[0])

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
        if index >= self.in_init and self._replace_by_attribute(index):
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

    def _replace_by_attribute(self, index: int) -> bool:
        """Replaces a number by an attribute that the constructor sets. Returns whether there is one."""
        column = self.columns[index]
        set_here = {match[1] for line in self.first.init if (match := _NUMBER_SET.fullmatch(line))}
        attribute, form = attribute_of(column, self.settings, self.existing - set_here), "{}"
        formula = formula_of(column, self.settings) if not attribute and OPEN in column else None
        if formula is not None:
            attribute, _, form = formula
        is_set = attribute in set_here or attribute in self.solution.attributes
        if is_set:
            self.replacement[index] = form.format(f"self.{attribute}")
        return is_set

    def _add_parameter(self, column: Column, attribute: str, suggested: str) -> None:
        """Adds a parameter with the name of an attribute of the original, or with the one that is suggested."""
        is_flag = suggested.endswith("?") or ({*column} <= {"True", "False"} and suggested in self.keywords)
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
        for body in _common_comments(self.members, self.parameters):
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
                *(
                    f"{name}={column[row]}"
                    for name, column in optional.items()
                    if column[row] != "None" or CAUSAL in column
                ),
                *(f"{name}={column[row]}" for name, column in flags.items()),
            ]
            for row in range(len(self.members))
        ]
        return parameters, arguments


def attributes_read(members: list[Instance]) -> dict[str, Column]:
    """Returns the numbers of the original that methods read and no constructor sets, with those of each instance."""
    methods = "\n".join(body.key() for body in members[0].bodies)
    set_here = {name for line in members[0].init for name in re.findall(r"self\.(\w+) = ", line)}
    set_here |= {*re.findall(r"self\.(\w+)(?:\[[^\]]*\])? = ", methods)}
    names = dict.fromkeys(re.findall(r"\bself\.(\w+)\b(?!\()", methods))
    return {
        name: tuple(repr(item.settings[name]) for item in members)
        for name in names
        if name not in set_here and all(type(item.settings.get(name)) in (int, float) for item in members)
    }


def _compatible(column: tuple[str, ...], hint: str, parameters: dict[tuple[str, ...], str]) -> tuple[str, ...] | None:
    """Returns the column of a parameter with the numbers of a column that some instances lack, None without one."""
    found = [
        other for other in parameters if all(value in (OPEN, mine) for value, mine in zip(column, other, strict=True))
    ]
    named = [other for other in found if re.fullmatch(rf"(\w+_)?{hint}(_\d+)?", parameters[other])]
    return named[0] if named else found[0] if found and len({*column} - {OPEN}) > 1 else None


def _common_comments(members: list[Instance], parameters: dict[Column, str] | None = None) -> list[Body]:
    """Returns the bodies of the first instance with the comments that all instances have.

    Args:
        members: The instances.
        parameters: The names of sizes that differ, by those of the instances.
    """
    bodies = []
    for number, body in enumerate(members[0].bodies):
        others = [item.bodies[number].lines for item in members[1:]]
        lines = [
            Line(
                line.code, _common([line.comment, *(other[row].comment for other in others)], parameters), line.depth
            )
            for row, line in enumerate(body.lines)
        ]
        bodies.append(Body(body.parameters, lines, body.returns))
    return bodies


def _widths_of_queries(text: str) -> dict[int, str]:
    """Returns the width of the queries for each number in the scale of a fused attention: `q.shape[-1]**-0.5`."""
    found = re.finditer(r"\bscaled_dot_product_attention\((\w+), [^\n]*?\bscale=(\S+?) ?\*\* ?-0\.5", text)
    starts = {match.start(2): f"{match[1]}.shape[-1]" for match in found}
    places = enumerate(NUMBER.finditer(text))
    return {index: starts[match.start()] for index, match in places if match.start() in starts}


def _common(comments: list[str], parameters: dict[Column, str] | None) -> str:
    """Returns the comment that all instances have, with names of sizes that differ; empty if there is none."""
    sizes = [*zip(*(comment.strip("[]").split(", ") for comment in comments), strict=False)]
    names = [column[0] if len({*column}) == 1 else (parameters or {}).get(column, "") for column in sizes]
    is_same = len({comment.count(",") for comment in comments}) == 1 and all(comments)
    return f"[{', '.join(names)}]" if is_same and all(names) else ""


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
                is_flag = match[0] in ("True", "False")
                hint = (
                    "dims" if attribute[1] in ("weight", "bias") else f"{attribute[1]}{'?' if is_flag else '_size'}"
                )
        if not hint and "reshape(" in before:
            hint = "size"
        hint = hint or "value"
        names.append("channels" if hint == "num_features" else hint)
    return names
