"""The classes of a source. Instances that differ in numbers only share a class with arguments."""

from __future__ import annotations

import graphlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from icenet.core.porting.layers.mlx_layers import NAMES
from icenet.core.porting.source import helpers
from icenet.core.porting.source.lines import WIDTH, Body, Line, lists, wrapped
from icenet.core.porting.source.structure import METHODS
from icenet.core.porting.source.variants import OPEN, union

MARK = re.compile(r"@(\d+)@")
NUMBER = re.compile(r"(?<![\w.\]])(?:(?:-(?=\d))?\d+(?:\.\d+)?(?:e-?\d+)?|True|False)(?![\w])|§")


@dataclass
class Class:
    """A generated class.

    Attributes:
        name: Its name.
        init: The statements of its constructor.
        bodies: The bodies of its methods, `__call__` first.
        parameters: The parameters of its constructor.
    """

    name: str
    init: list[str]
    bodies: list[Body] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)


@dataclass
class Instance:
    """An instance of a class that is to be generated.

    Attributes:
        name: The name of the class in the original.
        init: The statements of its constructor, with a mark in the place of each inner instance.
        bodies: The bodies of its methods.
        height: 1 without inner instances, and one more than that of the highest inner one.
        settings: Its attributes in the original that are numbers, by name.
        text: All of this as one text, by which equal instances are found.
    """

    name: str
    init: list[str]
    bodies: list[Body]
    height: int
    settings: dict[str, Any] = field(default_factory=dict)
    text: str = ""


def resolve(instances: list[Instance], taken: set[str]) -> list[Class]:
    """Makes the classes of all instances. Instances that differ in numbers only share one.

    Args:
        instances: The instances.
        taken: Names that the source has already.
    """
    taken = set(taken)
    names = dict(NAMES)
    classes: list[Class] = []
    sources: dict[int, str] = {}
    heights = _heights(instances)
    for height in sorted(set(heights)):
        groups: dict[tuple[str, str], list[int]] = {}
        for index, item in enumerate(instances):
            if heights[index] == height:
                item.init = [lists(MARK.sub(lambda m: sources[int(m[1])], line)) for line in item.init]
                item.text = _text(item)
                groups.setdefault((item.name, NUMBER.sub("#", item.text)), []).append(index)
        for name, members in _with_variants(instances, groups):
            unique, number = name, 1
            while unique in taken or helpers.exists(unique):
                number += 1
                unique = f"{name}{number}"
            taken.add(unique)
            made, arguments = unified(unique, [instances[index] for index in members], names)
            names[unique] = [parameter.partition("=")[0] for parameter in made.parameters]
            classes.append(made)
            for index, values in zip(members, arguments, strict=True):
                sources[index] = f"{unique}({', '.join(values)})"
    return classes


def _text(item: Instance) -> str:
    return "\n".join([*item.init, "-" * 8, *(body.key() for body in item.bodies)])


def _heights(instances: list[Instance]) -> list[int]:
    """Returns the heights of instances, with one for all of a class so that they may share it."""
    inner: dict[str, set[str]] = {}
    for item in instances:
        children = {instances[int(index)].name for line in item.init for index in MARK.findall(line)}
        inner.setdefault(item.name, set()).update(children)
    try:
        order = list(graphlib.TopologicalSorter(inner).static_order())
    except graphlib.CycleError:  # a class within itself
        return [item.height for item in instances]
    return [order.index(item.name) for item in instances]


def _with_variants(
    instances: list[Instance], groups: dict[tuple[str, str], list[int]]
) -> Iterator[tuple[str, list[int]]]:
    """Yields the instances of each class. A class of which some instances have further layers is one."""
    variants: dict[str, list[list[int]]] = {}
    for (name, _), members in groups.items():
        variants.setdefault(name, []).append(members)
    for name, parts in variants.items():
        if len(parts) == 2:
            first, second = (instances[members[0]] for members in parts)
            identities = _identities(first, second)
            inits = [[line for line in item.init if line not in identities] for item in (first, second)]
            found = union((inits[0], first.bodies), (inits[1], second.bodies), _masked)
            if found is not None:
                made, is_first_large = found
                for index in (index for members in parts for index in members):
                    instances[index].init = [line for line in instances[index].init if line not in identities]
                for members, is_large in zip(parts, (is_first_large, not is_first_large), strict=True):
                    for index in members:
                        item = instances[index]
                        item.init, item.bodies = made.written(item.init, item.bodies, is_large, _masked)
                        item.text = _text(item)
                parts = [sorted(index for members in parts for index in members)]
        for members in parts:
            yield name, members


def _identities(first: Instance, second: Instance) -> set[str]:
    """Returns the statements that set an identity in one of two instances where the other has a layer.

    Its class can lack the layer: an identity is not called.
    """
    found = set()
    for one, other in ((first, second), (second, first)):
        targets = {line.partition(" = ")[0] for line in other.init if not line.endswith(" = nn.Identity()")}
        code = "\n".join(body.key() for body in one.bodies)
        for line in one.init:
            target, _, value = line.partition(" = ")
            if value == "nn.Identity()" and target in targets and f"{target}(" not in code:
                found.add(line)
    return found


def _masked(text: str) -> str:
    return NUMBER.sub(OPEN, text)


def unified(name: str, members: list[Instance], names: dict[str, list[str]]) -> tuple[Class, list[list[str]]]:
    """Returns the class of some instances whose texts differ in numbers, and the arguments of each instance."""
    numbers = [NUMBER.findall(item.text) for item in members]
    columns = list(zip(*numbers, strict=True))
    varying = [index for index, column in enumerate(columns) if len(set(column)) > 1]
    varying.sort(key=lambda index: OPEN in columns[index])  # numbers that some instances lack are those of others
    first = members[0]
    in_init = len(NUMBER.findall("\n".join(first.init)))
    known = _known_numbers(members, in_init, {*re.findall(r"self\.(\w+)", first.text), *METHODS})
    known = {index: key for index, key in known.items() if index not in varying}
    if not varying and not known:
        return Class(name, first.init, _common_comments(members)), [[] for _ in members]
    suggested = hints(first.text, names)
    parameters: dict[tuple[str, ...], str] = {}
    replacement: dict[int, str] = {}
    taken = {*re.findall(r"self\.(\w+)", first.text), *METHODS}
    stored: dict[str, None] = {}
    forms: dict[int, str] = {}
    """How a number is written with its parameter: -{} or 1 - {}."""
    flags: set[str] = set()
    for index in varying:
        column = columns[index]
        if OPEN in column:
            like = _compatible(column, suggested[index], parameters)
            if like is None and len({*column} - {OPEN}) == 1:
                replacement[index] = next(value for value in column if value != OPEN)
                continue
            column = like or tuple("None" if value == OPEN else value for value in column)
        if column not in parameters:
            attribute = _attribute(column, members, taken)
            formula = _formula(column, members) if not attribute and index >= in_init else None
            if formula is not None:
                attribute, column, forms[index] = formula
        if column not in parameters:
            hint = attribute if attribute and attribute not in taken else suggested[index].removesuffix("?")
            unique, number = hint, 1
            while unique in taken and not suggested[index].endswith("?"):
                number += 1
                unique = f"{hint}_{number}"
            taken.add(unique)
            parameters[column] = unique
            if suggested[index].endswith("?"):
                flags.add(unique)
        replacement[index] = parameters[column]
        if index >= in_init:
            stored[parameters[column]] = None
            replacement[index] = forms.get(index, "{}").format(f"self.{parameters[column]}")
    values = {key: columns[index][0] for index, key in known.items() if key not in taken}
    replacement |= {index: f"self.{key}" for index, key in known.items() if key in values}
    position = -1

    def put(match: re.Match[str]) -> str:
        nonlocal position
        position += 1
        return replacement.get(position, match[0])

    init = [NUMBER.sub(put, line) for line in first.init]
    bodies = []
    for body, common in zip(first.bodies, _common_comments(members), strict=True):
        lines = [
            Line(NUMBER.sub(put, line.code), other.comment, line.depth)
            for line, other in zip(body.lines, common.lines, strict=True)
        ]
        bodies.append(Body(body.parameters, lines, body.returns))
    init = [*(f"self.{item} = {item}" for item in stored), *(f"self.{key} = {values[key]}" for key in values), *init]
    options = {key: column for column, key in parameters.items() if key not in flags and "None" in column}
    plain = {column: key for column, key in parameters.items() if key not in flags and key not in options}
    switches = {key: column for column, key in parameters.items() if key in flags}
    arguments = []
    for row in range(len(members)):
        given = [f"{key}={column[row]}" for key, column in options.items() if column[row] != "None"]
        given += [f"{key}=True" for key, column in switches.items() if column[row] == "True"]
        arguments.append([*(column[row] for column in plain), *given])
    defaults = [*(f"{key}=None" for key in options), *(f"{key}=False" for key in switches)]
    return Class(name, init, bodies, [*plain.values(), *defaults]), arguments


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


def class_source(item: Class) -> str:
    """Returns the source of a class."""
    lines = [f"class {item.name}(nn.Module):"]
    if item.init or item.parameters:
        lines += wrapped(f"def __init__({', '.join(['self', *item.parameters])}):", 4)
        lines.append("        super().__init__()")
        for text in item.init:
            bare = text.lstrip()
            lines += wrapped(bare, 8 + len(text) - len(bare))
    for number, body in enumerate(item.bodies):
        if len(lines) > 1:
            lines.append("")
        name = "__call__" if number == 0 else f"call_{number + 1}"
        lines += wrapped(f"def {name}({', '.join(['self', *body.parameters])}):", 4)
        shape = None
        for line in body.lines:
            code = wrapped(line.code, 8 + 4 * line.depth)
            said = line.comment[1:-1] + "," * ("," not in line.comment)
            is_said = f"({said})" in line.code  # x.reshape(B, T, 32)
            if (
                line.comment
                and line.comment != shape
                and not is_said
                and len(code[-1]) + len(line.comment) + 4 <= WIDTH
            ):
                code[-1] += f"  # {line.comment}"
            shape = line.comment or shape
            lines += code
        if not body.lines:
            lines.append("        pass")
    if len(lines) == 1:
        lines.append("    pass")
    return "\n".join(lines)
