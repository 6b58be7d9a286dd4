"""The arguments of constructors: those of the original, where its source says which numbers they give to layers."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from icenet.core.porting.record import Constructor
from icenet.core.porting.source.constructor_arguments import Evidence
from icenet.core.porting.source.constructor_pairing import Pairing
from icenet.core.porting.source.constructor_syntax import Original, key_of, original_at
from icenet.core.porting.source.constructor_values import Unknown, Values, number
from icenet.core.porting.source.instances import Instance
from icenet.core.porting.source.lines import RESERVED
from icenet.core.porting.source.structure import METHODS


@dataclass
class Signature:
    """The arguments of a generated class: each is an argument of the original's constructor or a part of one.

    Attributes:
        original: The constructor.
        keys: What each argument is in it, such as "dim" or "config.hidden_size", by its name.
    """

    original: Original
    keys: dict[str, str] = field(default_factory=dict)


@dataclass
class Solution:
    """The numbers of a constructor as expressions of its arguments.

    Attributes:
        expressions: The source in the place of a number, by its place.
        arguments: The values of each argument, one for each instance, by name.
        defaults: The arguments that have a default in the original which no instance differs from.
        attributes: The source of attributes that methods or other statements read, by name.
        statements: The statements that set these attributes, and variables of the constructor.
        signature: The arguments, for classes that make such instances.
        keys: What each argument is in the original, by name.
    """

    expressions: dict[int, str] = field(default_factory=dict)
    arguments: dict[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    statements: list[str] = field(default_factory=list)
    signature: Signature | None = None
    keys: dict[str, str] = field(default_factory=dict)


class Constructors:
    """The constructors of the original, and the arguments of the classes that were made of them.

    Args:
        places: Where the original makes each instance, None where that is not known.
        layers: Where the classes that become a layer make it, by name and place.
    """

    def __init__(self, places: Iterable[Constructor | None], layers: Iterable[tuple[str, Constructor]] = ()) -> None:
        known = {(item.file, item.line) for item in places if item is not None}
        self.originals = [item for item in (original_at(*place) for place in sorted(known)) if item is not None]
        self.signatures: dict[str, Signature] = {}
        found: dict[str, list[Original | None]] = {}
        for name, file, line in {(name, item.file, item.line) for name, item in layers}:
            found.setdefault(name, []).append(original_at(file, line))
        self.layers = {name: items[0] if len(items) == 1 else None for name, items in found.items()}

    def solved(
        self,
        name: str,
        instance: Instance,
        lines: list[str],
        columns: dict[tuple[int, int], tuple[int, tuple[str, ...]]],
        settings: list[dict[str, Any]],
        wanted: Iterable[str],
    ) -> Solution:
        """Returns the numbers of a constructor as the original has them.

        Args:
            name: The name of the class.
            instance: One of its instances.
            lines: The statements of the constructor that is to be written.
            columns: For the line and column of each number: its place, and its value in each instance.
            settings: The attributes of each instance in the original that are numbers.
            wanted: The attributes that methods read.
        """
        constructor = instance.constructor
        original = original_at(constructor.file, constructor.line) if constructor is not None else None
        if constructor is None or original is None:
            return Solution()
        evidence = self.evidence(original, lines, columns)
        values = Values(original, dict(constructor.constants), settings)
        evidence.find_arguments(values)
        solver = _Solver(values)
        solver.replace_numbers(evidence)
        for attribute in wanted:
            solver.attribute(attribute)

        def given(place: int, parameter: str) -> bool:
            return any(item.gives(instance.name, place, parameter) for item in self.originals)

        solution = solver.solution(given)
        if solution.signature is not None and solution.arguments:
            self.signatures[name] = solution.signature
        return solution

    def evidence(
        self, original: Original, lines: list[str], columns: dict[tuple[int, int], tuple[int, tuple[str, ...]]]
    ) -> Evidence:
        """Returns what the original may have in the place of each number."""
        candidates: dict[int, list[ast.expr]] = {}
        unsure = set()
        for row, line in enumerate(lines):
            for column, expression, is_sure in Pairing(original, self.signatures, self.layers).pairs(line):
                if (row, column) in columns:
                    place = columns[row, column][0]
                    candidates.setdefault(place, []).append(expression)
                    unsure |= {place} if not is_sure else set()
        return Evidence(candidates, dict(columns.values()), unsure)


class _Solver:
    """Writes expressions of the original with the arguments of the constructor that is to be written."""

    def __init__(self, values: Values) -> None:
        self.values, self.original, self.known = values, values.original, values.known
        self.names: dict[str, str] = {}
        """The names of arguments by what they are in the original."""
        self.result = Solution()
        self.is_set: set[str] = set()
        """The variables that the constructor sets."""
        self.open: set[str] = set()
        """The attributes whose expressions are being written."""

    def replace_numbers(self, evidence: Evidence) -> None:
        """Finds the expressions of the numbers."""
        for place in sorted(evidence.candidates):
            column = evidence.numbers[place]
            if set(column) <= {"True", "False"} and len(set(column)) == 1:
                continue
            branches = [inner for item in evidence.candidates[place] for inner in self.values.branches(item)]
            expression = self.values.only(branches, column)
            default = self.original.defaults.get(key_of(expression)) if expression is not None else None
            if default is not None and {ast.unparse(default)} == {*column} <= {"0", "1", "0.0"}:
                continue  # such as the padding 1 of a convolution whose dilation is 1
            text = self.written(expression) if expression is not None else None
            if text is not None:
                self.result.expressions[place] = text

    def solution(self, given: Callable[[int, str], bool]) -> Solution:
        """Returns all that was found, with the arguments in the order of the original.

        Args:
            given: Returns whether the original ever gives an argument, by its place and its name.
        """
        signature = Signature(self.original)
        order = {name: index for index, name in enumerate(self.original.parameters)}
        for key in sorted(self.names, key=lambda key: order.get(key.partition(".")[0], len(order))):
            name, values = self.names[key], tuple(map(_text, self.known[key]))
            default = self.original.defaults.get(key)
            is_default = default is not None and {*values} == {_text(number(ast.unparse(default)))}
            if is_default and not given(order[key], key):
                self.result.defaults[name] = values[0]
            else:
                signature.keys[name] = key
            self.result.arguments[name] = values
            self.result.keys[name] = key
        self.result.signature = signature
        return self.result

    def written(self, expression: ast.expr) -> str | None:
        """Returns the source of an expression in the constructor that is written, None if it has none."""
        try:
            return ast.unparse(_Names(self).visit(copy.deepcopy(expression)))
        except Unknown:
            return None

    def name(self, key: str) -> ast.expr:
        """Returns the source of what an expression reads: an argument, an attribute, or a variable that is set.

        Raises:
            Unknown: There is none.
        """
        if key.startswith("self."):
            return self.name_of_attribute(key.removeprefix("self."))
        if key in self.known:
            return self.name_of_argument(self.same(key))
        variable = self.values.variable(key)
        if variable is not None and key_of(variable) in self.known:
            return self.name(key_of(variable))
        if variable is None or key in self.names.values():
            raise Unknown
        if key not in self.is_set:
            text = self.written(variable)
            if text is None:
                raise Unknown
            self.is_set.add(key)
            self.result.statements.append(f"{key} = {text}")
        return ast.Name(key)

    def name_of_attribute(self, name: str) -> ast.expr:
        """Returns the source of an attribute: of the argument that it is, of its number, or of itself."""
        expressions = self.original.attributes.get(name, [])
        inner = key_of(expressions[0]) if len(expressions) == 1 else ""
        if inner in self.known:
            return self.name(inner)
        constants = self.values.constants
        if name not in self.values.settings[0] and name in constants:
            return ast.Constant(constants[name])
        if self.attribute(name):
            return ast.parse(f"self.{name}", mode="eval").body
        raise Unknown

    def name_of_argument(self, key: str) -> ast.expr:
        """Returns the source of an argument: the last part of what it is in the original."""
        root, _, name = key.rpartition(".")
        if root and name in [text for other, text in self.names.items() if other != key]:
            name = f"{root.removesuffix('_config').rpartition('.')[2]}_{name}"  # vision_hidden_size
        name = self.names.setdefault(key, name)
        is_taken = [*self.names.values()].count(name) > 1
        if is_taken or not name.isidentifier() or name.startswith("_") or name in RESERVED:
            del self.names[key]
            raise Unknown
        return ast.Name(name)

    def same(self, key: str) -> str:
        """Returns the argument of the original that always has the value of a variable, or the variable itself."""
        values = [*map(repr, self.known[key])]
        assigned = self.original.assigned.get(key, [])
        read = [key_of(node) for value in assigned for node in ast.walk(value)]  # y = y or x
        others = [
            name
            for name in self.original.parameters
            if name != key and [*map(repr, self.known.get(name, []))] == values
            if name in read or (key not in self.original.parameters and "." not in key and len(set(values)) > 1)
        ]
        return others[0] if others else key

    def attribute(self, name: str) -> bool:
        """Notes the source of an attribute, and returns whether there is one."""
        expressions, settings = self.original.attributes.get(name, []), self.values.settings
        if name in self.result.attributes or name in METHODS:
            return name not in METHODS
        if name in self.open:
            return False  # it is computed from itself
        column = tuple(repr(item.get(name)) for item in settings)
        if not expressions or not all(number(text) is not None for text in column):
            return False
        if all(isinstance(item, ast.Constant) for item in expressions) and len(set(column)) == 1:
            return False  # a number of the original
        self.open.add(name)
        branches = [inner for item in expressions for inner in self.values.branches(item)]
        expression = self.values.only(branches, column)
        text = self.written(expression) if expression is not None else None
        self.open.discard(name)
        if text is None and name not in self.names.values():
            self.known[f"self.{name}"] = [item[name] for item in settings]
            self.names[f"self.{name}"] = text = name
        if text is not None:
            self.result.attributes[name] = text
            self.result.statements.append(f"self.{name} = {text}")
        return text is not None


class _Names(ast.NodeTransformer):
    """Puts arguments of the written constructor in the place of what an expression of the original reads."""

    def __init__(self, solver: _Solver) -> None:
        self.solver = solver

    def visit(self, node: ast.AST) -> ast.AST:
        key = key_of(node)
        if key:
            return self.solver.name(key)
        if isinstance(node, ast.Call):
            node.args = [self.visit(item) for item in node.args]  # type: ignore[misc]
            return node
        return self.generic_visit(node)


def _text(value: Any) -> str:
    """Returns a number as a person writes it: 1e-6."""
    return re.sub(r"e-0(?=\d)", "e-", repr(value))
