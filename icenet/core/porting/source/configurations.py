"""The configuration of a port: one argument of the constructors that read many attributes of one object."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

_FEWEST = 5
"""How many numbers a configuration has at least; fewer are arguments."""


@dataclass
class _Reader:
    """A class whose arguments are attributes of the configuration."""

    item: Any
    read: dict[str, str]
    """The attribute of the configuration that each of these arguments is."""
    required: list[str]
    """The arguments without a default, in their order."""


def with_configuration(classes: list[Any], taken: set[str]) -> str:
    """Gives constructors the configuration in the place of its numbers.

    Args:
        classes: The classes, that of the whole module last. They are changed in place.
        taken: Names that the source has already.

    Returns:
        The source of the class of the configuration; empty if there is none.
    """
    readers = {}
    for item in classes:
        read = {name: key.partition(".")[2] for name, key in item.keys.items() if re.fullmatch(r"config\.\w+", key)}
        if read:
            required = [name for name in item.parameters if "=" not in name]
            readers[item.name] = _Reader(item, read, required)
    whole = classes[-1]
    trees = {
        (item.name, row): ast.parse(line.lstrip())
        for item in classes
        for row, line in enumerate(item.init)
        if not line.endswith(":")
    }
    for tree in trees.values():
        for name, argument in _own_flags(tree, readers):
            readers[name].read.pop(argument, None)
    readers = {name: reader for name, reader in readers.items() if reader.read}
    while True:
        wrong = {name for (owner, _), tree in trees.items() for name in _refused(tree, readers, readers.get(owner))}
        if not wrong:
            break
        readers = {name: reader for name, reader in readers.items() if name not in wrong}
    if whole.name not in readers or len(readers[whole.name].read) < _FEWEST or len(readers) < 2:
        return ""
    name = next(name for name in ("Config", "ModelConfig", "PortConfig") if name not in taken)
    values = dict(item.split("=", 1) for item in whole.parameters if "=" in item)
    read = readers[whole.name].read
    fields = [
        f"    {leaf}: {type(ast.literal_eval(values[key])).__name__} = {values[key]}" for key, leaf in read.items()
    ]
    for (owner, row), tree in trees.items():
        line = readers[owner].item.init[row] if owner in readers else ""
        if line:
            tree = _Reads(readers, readers[owner]).visit(tree)
            readers[owner].item.init[row] = line[: len(line) - len(line.lstrip())] + ast.unparse(tree)
    for reader in readers.values():
        item = reader.item
        rest = [parameter for parameter in item.parameters if parameter.partition("=")[0] not in reader.read]
        item.parameters = [f"config={name}()" if item is whole else "config", *rest]
    return "\n".join([f"@dataclass\nclass {name}:", *fields])


def _own_flags(tree: ast.AST, readers: dict[str, _Reader]) -> list[tuple[str, str]]:
    """Returns the arguments for which a statement gives a boolean: those of an encoder and a decoder differ."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in readers:
            pairs = zip(readers[node.func.id].required, node.args, strict=False)
            found += [
                (node.func.id, name)
                for name, value in pairs
                if isinstance(value, ast.Constant) and type(value.value) is bool
            ]
    return found


def _refused(tree: ast.AST, readers: dict[str, _Reader], owner: _Reader | None) -> list[str]:
    """Returns the classes of which a statement makes an instance with other numbers than those of a configuration."""
    found = []
    for node in ast.walk(tree):
        reader = readers.get(node.func.id) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
        if reader is None or not isinstance(node, ast.Call):
            continue
        given = dict(zip(reader.required, node.args, strict=False))
        for name, leaf in reader.read.items():
            value = given.get(name)
            is_same = isinstance(value, ast.Name) and owner is not None and owner.read.get(value.id) == leaf
            if not is_same:
                found.append(reader.item.name)
                break
    return found


class _Reads(ast.NodeTransformer):
    """Reads the configuration in the place of arguments, and gives it to other constructors."""

    def __init__(self, readers: dict[str, _Reader], owner: _Reader) -> None:
        self.readers, self.owner = readers, owner

    def visit_Call(self, node: ast.Call) -> ast.Call:
        reader = self.readers.get(node.func.id) if isinstance(node.func, ast.Name) else None
        if reader is not None:
            pairs = [*zip([*reader.required, *[""] * len(node.args)], node.args, strict=False)]
            node.args = [ast.Name("config"), *(value for name, value in pairs if name not in reader.read)]
        node.args = [self.visit(item) for item in node.args]
        node.keywords = [ast.keyword(item.arg, self.visit(item.value)) for item in node.keywords]
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        leaf = self.owner.read.get(node.id)
        return ast.Attribute(ast.Name("config"), leaf) if leaf else node
