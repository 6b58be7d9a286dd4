"""Sequences of the same layers as functions: `conv_block(8, 16)` for each of six layers that differ in numbers."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass

from icenet.core.porting.layers.mlx_layers import DEFAULTS, NAMES
from icenet.core.porting.source import helpers
from icenet.core.porting.source.instances import Class
from icenet.core.porting.source.lines import wrapped
from icenet.core.porting.source.simplify import Constructors, text
from icenet.core.porting.source.unification import hints
from icenet.core.porting.source.variants import OPEN

_SAVED = 3
"""How many layers a function must save."""


@dataclass
class _Sequence:
    """A sequence in a constructor: its call, the name of its class, and the variables of the constructor."""

    call: ast.Call
    kind: str
    parameters: list[str]
    height: int


def functions(classes: list[Class], kinds: set[str], taken: set[str]) -> list[str]:
    """Writes sequences that differ in numbers only as calls of functions, and returns the functions.

    Args:
        classes: The classes; their constructors are changed in place.
        kinds: The names that the constructors have for sequences: `Sequential`, and classes derived from it.
        taken: Names that the source has already.
    """
    trees = {
        (number, row): ast.parse(line.lstrip())
        for number, item in enumerate(classes)
        for row, line in enumerate(item.init)
        if any(f"{kind}(" in line for kind in kinds) and not line.endswith(":")
    }
    taken = taken | {name for item in classes for name in (item.name, *item.parameters)}
    names = {**NAMES, **{item.name: [name.partition("=")[0] for name in item.parameters] for item in classes}}
    found: list[str] = []
    height = 0
    while True:
        sequences = [
            item
            for (number, _), tree in trees.items()
            for item in _sequences(tree, kinds, _variables(classes[number]))
        ]
        if height > max((item.height for item in sequences), default=0):
            break
        groups: dict[tuple[str, str], list[_Sequence]] = {}
        for item in sequences:
            if item.height == height:
                groups.setdefault((item.kind, _form(item)), []).append(item)
        for members in groups.values():
            layers = [ast.unparse(layer).startswith("nn.") for layer in _layers(members[0].call)]
            is_block = len(layers) > 1 and 2 * sum(layers) >= len(layers)  # not a stage of blocks of the original
            if is_block and len(layers) * (len(members) - 1) >= _SAVED:
                found.append(_function(members, names, kinds, taken))
        height += 1
    for item in sequences:
        item.call.func = ast.Name("Sequential")
    for (number, row), tree in trees.items():
        line = classes[number].init[row]
        classes[number].init[row] = line[: len(line) - len(line.lstrip())] + ast.unparse(tree)
    return found


def _variables(item: Class) -> list[str]:
    """Returns the variables of a constructor: its parameters and those that it sets."""
    lines = [line.partition(" = ")[0] for line in item.init]
    return ["self", *(name.partition("=")[0] for name in item.parameters), *(n for n in lines if n.isidentifier())]


def _sequences(tree: ast.AST, kinds: set[str], parameters: list[str]) -> Iterator[_Sequence]:
    """Yields the sequences of a statement with their heights: 0 without others within."""
    for node in ast.walk(tree):
        if _is_sequence(node, kinds):
            assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            yield _Sequence(node, node.func.id, parameters, _height(node, kinds) - 1)


def _is_sequence(node: ast.AST, kinds: set[str]) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in kinds
        and len(node.args) == 1
        and isinstance(node.args[0], ast.List)
    )


def _height(node: ast.AST, kinds: set[str]) -> int:
    inner = max((_height(child, kinds) for child in ast.iter_child_nodes(node)), default=0)
    return inner + _is_sequence(node, kinds)


def _layers(call: ast.Call) -> list[ast.expr]:
    assert isinstance(call.args[0], ast.List)
    return call.args[0].elts


def _open_calls(tree: ast.AST) -> list[ast.Call]:
    """Returns the layers whose keywords have known defaults, in the order of the text."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and "Pool" not in node.func.attr:
            found.append(node)
    return found


class _Values(ast.NodeTransformer):
    """Puts a mark in the place of each number, parameter and class of an activation, and notes them."""

    def __init__(self, parameters: list[str]) -> None:
        self.parameters = parameters
        self.found: list[str] = []

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if not isinstance(node.value, (int, float)):
            return node
        self.found.append(ast.unparse(node))
        return ast.Name(OPEN)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:  # nn.ReLU()
            self.found.append(ast.unparse(node.func))
            return ast.Call(ast.Name(OPEN), [], [])
        self.generic_visit(node)
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in self.parameters:
            return node
        self.found.append(node.id)
        return ast.Name(OPEN)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if not {item.id for item in ast.walk(node) if isinstance(item, ast.Name)} & {*self.parameters}:
            return node
        self.found.append(ast.unparse(node))
        return ast.Name(OPEN)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.found.append(ast.unparse(node))  # 4 * dim
        return ast.Name(OPEN)

    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        if node.arg not in DEFAULTS:
            return ast.keyword(node.arg, self.visit(node.value))
        self.found.append(ast.unparse(node.value))  # 2 or (2, 1)
        return ast.keyword(node.arg, ast.Name(OPEN))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        if isinstance(node.operand, ast.Constant):  # -1
            self.found.append(ast.unparse(node))
            return ast.Name(OPEN)
        return node


def _form(item: _Sequence) -> str:
    """Returns what sequences that differ in numbers only have in common."""
    call = copy.deepcopy(item.call)
    for layer in _open_calls(call):
        layer.keywords = [keyword for keyword in layer.keywords if keyword.arg not in DEFAULTS]
    return ast.unparse(_Values(item.parameters).visit(call))


def _with_equal_keywords(calls: list[ast.Call]) -> None:
    """Gives a layer of several sequences the same keywords in each of them."""
    for layers in zip(*map(_open_calls, calls), strict=True):
        needed = dict.fromkeys(item.arg for layer in layers for item in layer.keywords if item.arg)
        for layer in layers:
            given = {item.arg: item.value for item in layer.keywords}
            layer.keywords = [
                ast.keyword(name, given.get(name) or ast.Constant(DEFAULTS[name]))
                for name in sorted(needed, key=lambda name: [*DEFAULTS, name].index(name))
            ]


def _function(members: list[_Sequence], names: dict[str, list[str]], kinds: set[str], taken: set[str]) -> str:
    """Returns the source of the function of some sequences, and makes them calls of it."""
    docstring = f'"""Returns {_described(members)}."""'
    _with_equal_keywords([item.call for item in members])
    visitors = [_Values(item.parameters) for item in members]
    forms = [visitor.visit(copy.deepcopy(item.call)) for visitor, item in zip(visitors, members, strict=True)]
    columns = list(zip(*(visitor.found for visitor in visitors), strict=True))
    is_open = [len(set(column)) > 1 or not _is_literal(column[0]) for column in columns]
    parameters: dict[tuple[str, ...], str] = {}
    form = ast.unparse(forms[0])
    for column, hint, is_varying in zip(columns, _hints(form, names), is_open, strict=True):
        if is_varying and column not in parameters:
            unique, number = hint, 1
            while unique in parameters.values():
                number += 1
                unique = f"{hint}_{number}"
            parameters[column] = unique
    name = _name(members, taken)
    taken.add(name)
    defaults = {key: repr(DEFAULTS[key]) for key in parameters.values() if key in DEFAULTS}
    order = [item for item in parameters.items() if item[1] not in defaults]
    switches = [item for item in parameters.items() if item[1] in defaults]
    names[name] = [key for _, key in (*order, *switches)]
    pairs = zip(columns, is_open, strict=True)
    values = iter(parameters[column] if is_varying else column[0] for column, is_varying in pairs)
    tree = ast.parse(f"return {re.sub(re.escape(OPEN), lambda _: next(values), form)}").body[0]
    for node in ast.walk(tree):
        if _is_sequence(node, kinds):  # the whole one, and those within that are no calls of functions
            assert isinstance(node, ast.Call)
            node.func = ast.Name("Sequential")
    signature = [*(key for _, key in order), *(f"{key}={defaults[key]}" for _, key in switches)]
    for row, item in enumerate(members):
        item.call.func = ast.Name(name)
        item.call.args = [ast.parse(column[row], mode="eval").body for column, _ in order]
        item.call.keywords = [
            ast.keyword(key, ast.parse(column[row], mode="eval").body)
            for column, key in switches
            if column[row] != defaults[key]
        ]
    code = text(Constructors().visit(tree))
    return "\n".join([*wrapped(f"def {name}({', '.join(signature)}):", 0), f"    {docstring}", *wrapped(code, 4)])


def _hints(form: str, names: dict[str, list[str]]) -> list[str]:
    """Returns a name for each mark of a form."""
    calls = [match[1] == "(" for match in re.finditer(rf"{re.escape(OPEN)}(.)", form)]
    return ["activation" if is_call else hint for hint, is_call in zip(hints(form, names), calls, strict=True)]


def _is_literal(code: str) -> bool:
    return all(not isinstance(node, ast.Name) or node.id == "nn" for node in ast.walk(ast.parse(code)))


def _kinds(members: list[_Sequence]) -> list[str]:
    """Returns the classes of the layers of sequences, each once; a place with several is an activation."""
    found: dict[str, None] = {}
    for layers in zip(*(_layers(item.call) for item in members), strict=True):
        kinds = {ast.unparse(layer).partition("(")[0].removeprefix("nn.") for layer in layers}
        found[kinds.pop() if len(kinds) == 1 else "activation"] = None
    return list(found)


def _described(members: list[_Sequence]) -> str:
    if members[0].kind != "Sequential":
        return f"the layers of {members[0].kind}"
    *first, last = _kinds(members)
    return f"a sequence of {', '.join(first)} and {last} layers" if first else f"a sequence of {last} layers"


def _name(members: list[_Sequence], taken: set[str]) -> str:
    """Returns a name of a function: that of the class, or of what most of its layers are."""
    kind, kinds = members[0].kind, " ".join(_kinds(members))
    if kind != "Sequential":
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", kind).lower()
    else:
        name = "conv_block" if "onv" in kinds else "linear_block" if "Linear" in kinds else "block"
    unique, number = name, 1
    while unique in taken or helpers.exists(unique):
        number += 1
        unique = f"{name}{number}"
    return unique
