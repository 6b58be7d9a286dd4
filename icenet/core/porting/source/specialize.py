"""Helper functions with the branches that a source takes: arguments that are the same in every call are folded.

A helper of `icenet/porting/functions` serves all cases of an operation. A port has one or two of them, so a person
would not have written the others.
"""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from icenet.core.porting import kinds
from icenet.core.porting.kinds import NUMBER, Helpers, Kind
from icenet.core.porting.source import helpers
from icenet.core.porting.source.lines import wrapped
from icenet.core.porting.source.simplify import text

_UNKNOWN, NOT_NONE = object(), object()
"""What is known about an argument: nothing, or that it is not None."""


@dataclass
class Calls:
    """The calls of a source.

    Attributes:
        trees: The statements of the classes; arguments that are folded are removed from their calls.
        given: What further calls give to the parameters of a function, by its name: the calls of recurrent layers.
    """

    trees: list[ast.AST]
    given: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    not_none: dict[str, set[str]] = field(default_factory=dict)
    """The parameters of each helper that are not None."""
    inner: dict[str, list[tuple[list[Kind | None], dict[str, Kind | None]]]] = field(default_factory=dict)
    """What is known about the arguments of the calls of each helper in others."""


def specialized(names: Helpers, calls: Calls) -> list[str]:
    """Returns the sources of helpers and of what they use, in the order of the files.

    Args:
        names: The helpers that the classes call.
        calls: The calls; changed in place.
    """
    order = helpers.needed(names)
    trees: dict[str, ast.AST] = {}
    calls.not_none = {}
    texts: dict[str, str] = {}
    for name in helpers.callers_first(order):
        if name not in calls.given and name not in helpers.read_in([*calls.trees, *trees.values()]):
            continue  # only a branch that is folded called it
        source = helpers.source(name)
        definition = ast.parse(source).body[0]
        if isinstance(definition, ast.FunctionDef):
            before = ast.dump(definition)
            if not _has_known_calls(name, names, calls, order, trees):
                names.unknown.add(name)
            definition = _of_kinds(definition, names, calls)
            _fold(definition, calls, trees)
            texts[name] = source if ast.dump(definition) == before else _Printer(source).function(definition)
        else:
            texts[name] = source
        trees[name] = definition
    for name, tree in trees.items():  # a later one may have removed arguments from calls in it
        if isinstance(tree, ast.FunctionDef) and ast.dump(tree) != ast.dump(ast.parse(texts[name]).body[0]):
            texts[name] = _Printer(helpers.source(name)).function(tree)
    return [texts[name] for name in order if name in texts]


def _has_known_calls(name: str, names: Helpers, calls: Calls, order: list[str], trees: dict[str, ast.AST]) -> bool:
    """Returns whether all calls of a function are those of the table and of the functions before it."""
    later = (other for other in order if other != name and other not in trees and helpers.uses(other, name))
    others = [tree for tree in trees.values() if not isinstance(tree, ast.FunctionDef)]
    passed = (is_call for tree in (*calls.trees, *trees.values()) for _, is_call in _uses(tree, name))
    return not any(later) and name not in calls.given and all(passed) and name not in helpers.read_in(others)


def _of_kinds(definition: ast.FunctionDef, names: Helpers, calls: Calls) -> ast.FunctionDef:
    """Returns a function without the branches on axes and dtypes that no call takes."""
    name, parameters = definition.name, [item.arg for item in definition.args.args]
    inner = calls.inner.get(name, [])
    rows = [dict(zip(parameters, given, strict=False)) | keywords for given, keywords in inner]
    known: dict[str, Kind] = {}
    if name not in names.unknown and not definition.args.vararg:
        rows = [*names.of(name, parameters), *rows]
        columns = {key: kinds.common([row.get(key) for row in rows]) for key in parameters} if rows else {}
        known = {key: value for key, value in columns.items() if value is not None}
    folder = _Folder({}, set(), copy.deepcopy(definition), known)
    folder.fold()
    if name in folder.called:  # with arrays of other kinds
        folder = _Folder({}, set(), copy.deepcopy(definition), {})
        folder.fold()
    for other, given in folder.called.items():
        calls.inner.setdefault(other, []).extend(given)
    return folder.definition


def _fold(definition: ast.FunctionDef, calls: Calls, callers: dict[str, ast.AST]) -> None:
    """Folds the constant arguments of a function, in its definition and in its calls."""
    arguments = definition.args
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or definition.decorator_list:
        return
    parameters = [item.arg for item in arguments.args]
    defaults = dict(zip(parameters[len(parameters) - len(arguments.defaults) :], arguments.defaults, strict=True))
    found, values = [], []
    for tree in (*calls.trees, *callers.values(), definition):
        for call, is_call in _uses(tree, definition.name):
            if not is_call:
                return  # passed as a value
            bound = _bound(call, parameters, defaults)
            if bound is None:
                if definition.name in calls.given:
                    continue  # said there
                return
            found.append(call)
            if tree is definition:  # a call of itself that gives its own argument says nothing
                bound = {
                    key: value
                    for key, value in bound.items()
                    if not (isinstance(value, ast.Name) and value.id == key)
                }
            values.append({key: _known(value, tree, calls) for key, value in bound.items()})
    values += [
        {
            key: given.get(key, _known(defaults[key], definition, calls) if key in defaults else _UNKNOWN)
            for key in parameters
        }
        for given in calls.given.get(definition.name, [])
    ]
    if not values:
        return
    stored = {
        item.id for item in ast.walk(definition) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)
    }
    stored |= {
        item.arg
        for inner in ast.walk(definition)
        if isinstance(inner, (ast.Lambda, ast.FunctionDef)) and inner is not definition
        for item in inner.args.args
    }
    constants: dict[str, ast.expr] = {}
    choices: dict[str, list[ast.expr]] = {}
    not_none = set()
    for key in parameters:
        column = [row[key] for row in values if key in row]
        first = column[0]
        if key in stored:
            not_none |= {key} if all(item is NOT_NONE for item in column) else set()
        elif isinstance(first, ast.expr) and all(
            isinstance(item, ast.expr) and ast.dump(item) == ast.dump(first) for item in column
        ):
            constants[key] = first
        elif all(item is NOT_NONE or (isinstance(item, ast.expr) and not _is_none(item)) for item in column):
            not_none.add(key)
        if key not in constants and key not in stored and all(isinstance(item, ast.expr) for item in column):
            choices[key] = list({ast.dump(item): item for item in column}.values())
    calls.not_none[definition.name] = not_none - stored
    _Folder(constants, not_none - stored, definition, choices=choices).fold()
    used = {item.id for item in ast.walk(definition) if isinstance(item, ast.Name)}
    removed = [key for key in constants if key not in used]
    for call in found:
        _without(call, parameters, removed)
    offset = len(parameters) - len(arguments.defaults)
    arguments.defaults = [
        value for index, value in enumerate(arguments.defaults) if parameters[index + offset] not in removed
    ]
    arguments.args = [item for item in arguments.args if item.arg not in removed]
    kept = [item.arg for item in arguments.args]
    if all(set(kept) <= _given(call, kept) for call in found) and definition.name not in calls.given:
        arguments.defaults = []  # every call gives all
    for given in calls.given.get(definition.name, []):
        if all(given.get(key) is NOT_NONE for key in kept[len(kept) - len(arguments.defaults) :]):
            arguments.defaults = []


def _given(call: ast.Call, parameters: list[str]) -> set[str]:
    return {*parameters[: len(call.args)], *(item.arg for item in call.keywords if item.arg)}


def _uses(tree: ast.AST, name: str) -> Iterator[tuple[Any, bool]]:
    """Yields the calls of a function, and other uses of its name."""
    called = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            called.add(id(node.func))
            yield node, True
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Name)
            and node.id == name
            and id(node) not in called
            and isinstance(node.ctx, ast.Load)
        ):
            yield node, False


def _bound(call: ast.Call, parameters: list[str], defaults: dict[str, ast.expr]) -> dict[str, ast.expr] | None:
    """Returns the arguments of a call by parameter, None if they are not all in the source."""
    if any(isinstance(item, ast.Starred) for item in call.args) or any(item.arg is None for item in call.keywords):
        return None
    given = dict(zip(parameters, call.args, strict=False))
    given |= {item.arg: item.value for item in call.keywords if item.arg}
    if len(call.args) > len(parameters) or any(key not in given and key not in defaults for key in parameters):
        return None
    return {key: given.get(key, defaults.get(key)) for key in parameters}  # type: ignore[misc]


def _known(value: ast.expr, tree: ast.AST, calls: Calls) -> Any:
    """Returns the expression of a constant, or what is known about another argument."""
    if _is_constant(value):
        return value
    if isinstance(tree, ast.FunctionDef) and isinstance(value, ast.Name):
        is_given = value.id in calls.not_none.get(tree.name, ())
        return NOT_NONE if is_given else _UNKNOWN  # a parameter of another helper may be None
    return _UNKNOWN if isinstance(value, ast.IfExp) else NOT_NONE


def _is_constant(value: ast.expr) -> bool:
    if isinstance(value, (ast.Tuple, ast.List)):
        return all(map(_is_constant, value.elts))
    if isinstance(value, ast.UnaryOp):
        return isinstance(value.op, ast.USub) and _is_constant(value.operand)
    if isinstance(value, ast.Attribute):  # mx.tanh
        return isinstance(value.value, ast.Name) and value.value.id in ("mx", "nn")
    return isinstance(value, ast.Constant)


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _without(call: ast.Call, parameters: list[str], removed: list[str]) -> None:
    """Removes arguments from a call."""
    call.args = [value for key, value in zip(parameters, call.args, strict=False) if key not in removed]
    call.keywords = [item for item in call.keywords if item.arg not in removed]


class _Folder(ast.NodeTransformer):
    """Replaces parameters by constants in a function, and takes the branches that are known."""

    def __init__(
        self,
        constants: dict[str, ast.expr],
        not_none: set[str],
        definition: ast.FunctionDef,
        known: dict[str, Kind] | None = None,
        choices: dict[str, list[ast.expr]] | None = None,
    ) -> None:
        self.choices = choices or {}
        """The constants that the calls give to a parameter, less those for which an earlier branch returned."""
        self.constants, self.not_none, self.definition = constants, not_none, definition
        self.kinds = known or {}
        """What is known about variables at the statement that is visited."""
        self.called: dict[str, list[tuple[list[Kind | None], dict[str, Kind | None]]]] = {}
        """The arguments of the calls of other helpers."""

    def fold(self) -> None:
        self.definition.body = _read(self.block(self.definition.body))

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for statement in statements:
            is_loop = isinstance(statement, (ast.For, ast.While, ast.With, ast.Try))
            for name in _stored(ast.AST if is_loop else ast.comprehension, statement):
                self.kinds.pop(name, None)
            made = self.visit(self.paired(statement))
            if not isinstance(made, list):
                self.assigned(statement)
            if isinstance(made, ast.Assign) and self.is_none(made):
                continue
            found += made if isinstance(made, list) else [made]
            if found and isinstance(found[-1], (ast.Return, ast.Raise)):
                break
        return found

    def paired(self, statement: ast.stmt) -> ast.stmt:
        """Returns `a, b = pair(a, b)` as what it does to an array and a number: the number becomes an array."""
        if ast.unparse(statement) != "a, b = pair(a, b)":
            return statement
        found = {name: self.kinds.get(name) for name in "ab"}
        arrays = [name for name, kind in found.items() if kind is not None and kind.category != NUMBER]
        if len(arrays) == 2:
            return ast.parse("a = a").body[0]
        other = {"a": "b", "b": "a"}[arrays[0]] if arrays else ""
        if not arrays or found[other] is None:
            return statement
        return ast.parse(f"{other} = mx.array({other}, {arrays[0]}.dtype)").body[0]

    def assigned(self, statement: ast.stmt) -> None:
        """Notes what a statement says about the variables that it sets."""
        known, parts = self.kinds, [statement]
        if isinstance(statement, ast.If):
            branches = [branch for branch in (statement.body, statement.orelse) if branch]
            parts = [item for part in branches if not isinstance(part[-1], ast.Return) for item in part]
        found: dict[str, Kind | None] = dict.fromkeys(name for part in parts for name in _stored(ast.AST, part))
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            found[statement.targets[0].id] = kinds.of_expression(statement.value, known)
        elif ast.unparse(statement) == "a, b = pair(a, b)":
            first, second = known.get("a"), known.get("b")
            if first is not None and second is not None:
                found["a"] = Kind(second.category, 0, False) if first.category == NUMBER else first
                found["b"] = Kind(first.category, 0, False) if second.category == NUMBER else second
        self.kinds = {key: value for key, value in {**known, **found}.items() if value is not None}

    def visit_Call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Name):
            given = [kinds.of_expression(item, self.kinds) for item in node.args]
            named = {item.arg: kinds.of_expression(item.value, self.kinds) for item in node.keywords if item.arg}
            self.called.setdefault(node.func.id, []).append((given, named))
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        outer, self.kinds = self.kinds, {}  # it may have arguments of the same names, and be called later
        self.generic_visit(node)
        self.kinds = outer
        return node

    def is_none(self, statement: ast.Assign) -> bool:
        """Returns whether a statement sets a variable to None for the whole function, and notes it."""
        target, arguments = statement.targets[0], self.definition.args.args
        is_set = any(statement is item for item in self.definition.body) and _is_none(statement.value)
        if not is_set or not isinstance(target, ast.Name) or target.id in {item.arg for item in arguments}:
            return False
        stores = [item for item in ast.walk(self.definition) if isinstance(item, ast.Name) and item.id == target.id]
        if sum(isinstance(item.ctx, ast.Store) for item in stores) != 1:
            return False
        self.constants[target.id] = statement.value
        return True

    def truth(self, test: ast.expr) -> bool | None:
        """Returns the value of a condition, None if it is not known."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self.truth(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            parts = [self.truth(item) for item in test.values]
            decisive = isinstance(test.op, ast.Or)
            if decisive in parts:
                return decisive
            return None if None in parts else not decisive
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            left, right = test.left, test.comparators[0]
            if isinstance(left, ast.Name) and left.id in self.not_none and _is_none(right):
                return isinstance(test.ops[0], (ast.IsNot, ast.NotEq))
        of_kinds = kinds.truth(test, self.kinds)
        if of_kinds is not None:
            return of_kinds
        chosen = self.chosen(test)
        if chosen is not None:
            outcomes = {self.evaluated(test, {chosen: value}) for value in self.choices[chosen]}
            return outcomes.pop() if len(outcomes) == 1 else None
        return self.evaluated(test, {})

    def chosen(self, test: ast.expr) -> str | None:
        """Returns the parameter of several constants on which a condition depends, None if it is not one alone."""
        names = {item.id for item in ast.walk(test) if isinstance(item, ast.Name)} & self.choices.keys()
        return names.pop() if len(names) == 1 else None

    def evaluated(self, test: ast.expr, more: dict[str, ast.expr]) -> bool | None:
        """Returns the value of a condition of constants, None if it has others."""
        try:
            expression = _Put({**self.constants, **more}).visit(copy.deepcopy(test))
            if isinstance(expression, ast.Call) and ast.unparse(expression.func) == "mx.issubdtype":
                return _is_subdtype(*map(ast.unparse, expression.args))
            unknown = (item for item in ast.walk(expression) if isinstance(item, (ast.Name, ast.Call)))
            if any(isinstance(item, ast.Call) or item.id != "math" for item in unknown):
                return None
            if isinstance(expression, ast.Compare) and isinstance(expression.ops[0], (ast.Is, ast.IsNot)):
                same = ast.dump(expression.left) == ast.dump(expression.comparators[0])
                return same == isinstance(expression.ops[0], ast.Is)
            return bool(
                eval(compile(ast.Expression(ast.fix_missing_locations(expression)), "", "eval"), {"math": math})
            )
        except Exception:  # not an expression of constants
            return None

    def visit_If(self, node: ast.If) -> Any:
        value = self.truth(node.test)
        if value is None:
            node.test = self.reduced(node.test)
            before = dict(self.kinds)
            node.body = self.block(node.body)
            self.kinds = before
            node.orelse = self.block(node.orelse)
            self.kinds = before
            chosen = self.chosen(node.test)
            if chosen is not None and isinstance(node.body[-1], ast.Return) and not node.orelse:
                rest = [
                    item for item in self.choices[chosen] if self.evaluated(node.test, {chosen: item}) is not True
                ]
                self.choices = {**self.choices, chosen: rest or self.choices[chosen]}
            return node
        return self.block(node.body if value else node.orelse)

    def visit_For(self, node: ast.For) -> Any:
        node.iter = self.visit(node.iter)
        node.body = self.block(node.body)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        value = self.truth(node.test)
        if value is None:
            node.test = self.reduced(node.test)
            node.body, node.orelse = self.visit(node.body), self.visit(node.orelse)
            return node
        return self.visit(node.body if value else node.orelse)

    def reduced(self, test: ast.expr) -> ast.expr:
        """Returns a condition without the parts that are known."""
        if isinstance(test, ast.BoolOp):
            parts = [self.reduced(item) for item in test.values if self.truth(item) is None]
            return parts[0] if len(parts) == 1 else ast.BoolOp(test.op, parts)
        return self.visit(test)

    def visit_Name(self, node: ast.Name) -> Any:
        value = self.constants.get(node.id)
        if value is not None and isinstance(node.ctx, ast.Load) and not _is_number(value):
            return copy.deepcopy(value)
        return node


def _stored(kind: type[ast.AST], tree: ast.AST) -> set[str]:
    """Returns the variables that are set in parts of a tree of a kind."""
    parts = [part for part in ast.walk(tree) if isinstance(part, kind)]
    names = [item for part in parts for item in ast.walk(part) if isinstance(item, ast.Name)]
    return {item.id for item in names if isinstance(item.ctx, ast.Store)}


def _read(statements: list[ast.stmt]) -> list[ast.stmt]:
    """Returns statements without `x = x` and without other names for variables that nothing reads."""
    loaded = {
        item.id
        for statement in statements
        for item in ast.walk(statement)
        if isinstance(item, ast.Name)
        and isinstance(item.ctx, ast.Load)
        and not (isinstance(statement, ast.Assign) and statement.value is item)
    }

    def is_kept(statement: ast.stmt) -> bool:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Name):
            return True
        target = statement.targets[0]
        if not isinstance(target, ast.Name):
            return True
        return target.id != statement.value.id and target.id in loaded

    return [item for item in statements if is_kept(item)]


def _is_subdtype(dtype: str, kind: str) -> bool | None:
    """Returns the value of `mx.issubdtype`, None if it is not known."""
    kinds = {"mx.integer": ("mx.int", "mx.uint"), "mx.floating": ("mx.float", "mx.bfloat")}
    is_known = kind in kinds and dtype.removeprefix("mx.").isidentifier() and dtype.startswith("mx.")
    return dtype.startswith(kinds[kind]) if is_known else None


class _Put(ast.NodeTransformer):
    def __init__(self, constants: dict[str, ast.expr]) -> None:
        self.constants = constants

    def visit_Name(self, node: ast.Name) -> Any:
        return copy.deepcopy(self.constants.get(node.id, node))


def _is_number(value: ast.expr) -> bool:
    """Returns whether an argument is a number, whose name says more than its value."""
    value = value.operand if isinstance(value, ast.UnaryOp) else value
    if isinstance(value, (ast.Tuple, ast.List)):
        return True
    return (
        isinstance(value, ast.Constant)
        and isinstance(value.value, (int, float))
        and not isinstance(value.value, bool)
    )


class _Printer:
    """Prints a changed function. Statements that are as before keep their text, with line breaks and comments."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines()
        self.before = {
            _span(item): ast.dump(item) for item in ast.walk(ast.parse(source)) if isinstance(item, ast.stmt)
        }

    def function(self, definition: ast.FunctionDef) -> str:
        head = copy.copy(definition)
        head.body = [ast.Pass()]
        lines = wrapped(text(head).splitlines()[-2].strip(), 0)
        return "\n".join([*lines, *self.block(definition.body, 4)])

    def block(self, statements: list[ast.stmt], indent: int) -> list[str]:
        lines: list[str] = []
        after_function = False
        for statement in statements:
            is_function = isinstance(statement, ast.FunctionDef)
            lines += [*([""] if is_function or after_function else []), *self.statement(statement, indent)]
            after_function = is_function
        return lines

    def statement(self, statement: ast.stmt, indent: int) -> list[str]:
        if self.before.get(_span(statement)) == ast.dump(statement):
            decorators = getattr(statement, "decorator_list", [])
            first = min(item.lineno for item in (statement, *decorators)) - 1
            last = statement.end_lineno or statement.lineno
            own = self.lines[first:last]
            return [line and " " * indent + line[statement.col_offset :] for line in own]
        if isinstance(statement, (ast.If, ast.For)):
            head = copy.copy(statement)
            head.body, head.orelse = [ast.Pass()], []
            lines = [*wrapped(text(head).splitlines()[0], indent), *self.block(statement.body, indent + 4)]
            if statement.orelse:
                lines += [" " * indent + "else:", *self.block(statement.orelse, indent + 4)]
            return lines
        return [part for line in text(statement).splitlines() for part in _wrapped(line, indent)]


def _wrapped(line: str, indent: int) -> list[str]:
    inner = line.lstrip()
    return wrapped(inner, indent + len(line) - len(inner))


def _span(statement: ast.stmt) -> tuple[int, int, int | None]:
    return getattr(statement, "lineno", 0), getattr(statement, "col_offset", 0), getattr(statement, "end_lineno", 0)
