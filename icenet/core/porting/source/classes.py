"""The classes of a source. Instances that differ in numbers only share a class with arguments."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterable, Iterator

from icenet.core.porting.layers.mlx_layers import NAMES
from icenet.core.porting.record import Constructor
from icenet.core.porting.source import helpers
from icenet.core.porting.source.constructors import Constructors
from icenet.core.porting.source.instances import CAUSAL, NUMBER, Class, Instance
from icenet.core.porting.source.joined_variants import Variants
from icenet.core.porting.source.lines import WIDTH, lists, wrapped
from icenet.core.porting.source.unification import Unification

MARK = re.compile(r"@(\d+)@")
"""The mark of an inner instance, which is its number."""


def resolve(
    instances: list[Instance], taken: set[str], layers: Iterable[tuple[str, Constructor]] = ()
) -> list[Class]:
    """Makes the classes of all instances. Instances that differ in numbers only share one.

    Args:
        instances: The instances.
        taken: Names that the source has already.
        layers: The classes of the original that become a layer: name and constructor of each.
    """
    taken = set(taken)
    names = dict(NAMES)
    constructors = Constructors([item.constructor for item in instances], layers)
    classes: list[Class] = []
    sources: dict[int, str] = {}
    heights = _heights(instances)
    for height in sorted(set(heights)):
        present = [item for index, item in enumerate(instances) if heights[index] == height]
        causal = {item.name for item in present if any(f"mask={CAUSAL}" in body.key() for body in item.bodies)}
        groups: dict[tuple[str, str], list[int]] = {}
        for index, item in enumerate(instances):
            if heights[index] == height:
                item.init = [lists(MARK.sub(lambda m: sources[int(m[1])], line)) for line in item.init]
                if item.name in causal:
                    item.open_masks()
                item.note_text()
                groups.setdefault((item.name, NUMBER.sub("#", item.text)), []).append(index)
        for name, members in _with_variants(instances, groups):
            unique, number = name, 1
            while unique in taken or helpers.exists(unique):
                number += 1
                unique = f"{name}{number}"
            taken.add(unique)
            group = [instances[index] for index in members]
            is_whole = members == [len(instances) - 1]  # it is made without arguments
            made, arguments = Unification(unique, group, names, constructors, is_whole).result()
            names[unique] = [parameter.partition("=")[0] for parameter in made.parameters]
            classes.append(made)
            for index, values in zip(members, arguments, strict=True):
                sources[index] = f"{unique}({', '.join(values)})"
    _leave_out_defaults(classes)
    return classes


def _leave_out_defaults(classes: list[Class]) -> None:
    """Removes flags that are False, and masks that are None, from the instances in constructors."""
    flags = {item.name: item.flags for item in classes if item.flags}
    for item in classes:
        for row, line in enumerate(item.init):
            bare = line.lstrip()
            if re.search("=(?:False|None)", line) and not line.endswith(":"):
                item.init[row] = line[: len(line) - len(bare)] + ast.unparse(_Given(flags).visit(ast.parse(bare)))


class _Given(ast.NodeTransformer):
    """Removes keywords that are the default."""

    def __init__(self, flags: dict[str, set[str]]) -> None:
        self.flags = flags

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        flags = self.flags.get(node.func.id, set()) if isinstance(node.func, ast.Name) else set()
        node.keywords = [
            item
            for item in node.keywords
            if item.arg not in flags or ast.unparse(item.value) not in ("False", "None")
        ]
        return node


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
    """Yields the instances of each class. Variants of one class are one where a condition distinguishes them."""
    variants: dict[str, list[list[int]]] = {}
    for (name, _), members in groups.items():
        variants.setdefault(name, []).append(members)
    for name, parts in variants.items():
        for members in Variants(instances, parts).joined():
            yield name, members


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
