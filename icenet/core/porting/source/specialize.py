"""Helper functions with the branches that a source takes: arguments that are the same in every call are folded.

A helper of `icenet/porting/functions` serves all cases of an operation. A port has one or two of them, so a person
would not have written the others.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from icenet.core.porting import kinds
from icenet.core.porting.kinds import Helpers, Kind
from icenet.core.porting.source import helpers
from icenet.core.porting.source.folding import Folder, is_none
from icenet.core.porting.source.printing import Printer
from icenet.core.porting.source.tidy import inline, tidy

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
            known = _known_kinds(definition, names, calls)
            _fold_kinds(definition, known)
            _fold(definition, calls, trees, known)
            _fold(definition, calls, trees, known)  # an assignment of a parameter may have gone
            for other, given in _fold_kinds(definition, known).items():  # what a constant left of a branch
                calls.inner.setdefault(other, []).extend(given)
            texts[name] = source if ast.dump(definition) == before else Printer(source).function(definition)
        else:
            texts[name] = source
        trees[name] = definition
    for name, tree in trees.items():
        whole = ast.parse(helpers.source(name)).body[0]
        if isinstance(tree, ast.FunctionDef) and ast.dump(tree) != ast.dump(whole):
            tidy(tree, whole)
    for name in inline(trees, calls.trees):
        del trees[name], texts[name]
    for name, tree in trees.items():  # a later one may have removed arguments from calls in it
        if isinstance(tree, ast.FunctionDef) and ast.dump(tree) != ast.dump(ast.parse(texts[name]).body[0]):
            texts[name] = Printer(helpers.source(name)).function(tree)
    return [texts[name] for name in order if name in texts]


def _has_known_calls(name: str, names: Helpers, calls: Calls, order: list[str], trees: dict[str, ast.AST]) -> bool:
    """Returns whether all calls of a function are those of the table and of the functions before it."""
    later = (other for other in order if other != name and other not in trees and helpers.uses(other, name))
    others = [tree for tree in trees.values() if not isinstance(tree, ast.FunctionDef)]
    passed = (is_call for tree in (*calls.trees, *trees.values()) for _, is_call in _uses(tree, name))
    return not any(later) and name not in calls.given and all(passed) and name not in helpers.read_in(others)


def _known_kinds(definition: ast.FunctionDef, names: Helpers, calls: Calls) -> dict[str, Kind]:
    """Returns what all calls of a function say about its parameters."""
    name, parameters = definition.name, [item.arg for item in definition.args.args]
    if name in names.unknown or definition.args.vararg:
        return {}
    inner = calls.inner.get(name, [])
    rows = [dict(zip(parameters, given, strict=False)) | keywords for given, keywords in inner]
    rows = [*names.of(name, parameters), *rows]
    columns = {key: kinds.common([row.get(key) for row in rows]) for key in parameters} if rows else {}
    known = {key: value for key, value in columns.items() if value is not None}
    # a call of itself that is left may give arrays of other kinds
    return known if name not in _fold_kinds(copy.deepcopy(definition), known) else {}


def _fold_kinds(
    definition: ast.FunctionDef, known: dict[str, Kind]
) -> dict[str, list[tuple[list[Kind | None], dict[str, Kind | None]]]]:
    """Removes the branches on axes and dtypes that no call takes. Returns the arguments of the calls of helpers."""
    folder = Folder({}, set(), definition, dict(known))
    folder.fold()
    return folder.called


def _fold(definition: ast.FunctionDef, calls: Calls, callers: dict[str, ast.AST], known: dict[str, Kind]) -> None:
    """Folds the constant arguments of a function, in its definition and in its calls."""
    arguments = definition.args
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or definition.decorator_list:
        return
    found, values = _arguments_of_calls(definition, calls, callers)
    if not values:
        return
    parameters = [item.arg for item in arguments.args]
    stored, inner_names = _own_names(definition)
    constants: dict[str, ast.expr] = {}
    choices: dict[str, list[ast.expr]] = {}
    not_none = set()
    for key in parameters:
        column = [row[key] for row in values if key in row]
        first = column[0]
        is_constant = key not in stored | inner_names
        if (
            is_constant
            and isinstance(first, ast.expr)
            and all(isinstance(item, ast.expr) and ast.dump(item) == ast.dump(first) for item in column)
        ):
            constants[key] = first
        elif all(item is NOT_NONE or (isinstance(item, ast.expr) and not is_none(item)) for item in column):
            not_none.add(key)
        if key not in constants and is_constant and all(isinstance(item, ast.expr) for item in column):
            choices[key] = list({ast.dump(item): item for item in column}.values())
    calls.not_none[definition.name] = not_none - stored - inner_names
    categories = [known[key].category if key in known else None for key in parameters if key not in constants]
    ones = {key for key, value in constants.items() if ast.unparse(value) in ("1", "1.0")}
    # 1.0 * x is another dtype than x if x is an integer, which one of unknown kind may be
    factors = ones if all(category in ("floating", kinds.NUMBER) for category in categories) else set()
    Folder(constants, not_none - inner_names, definition, choices=choices, factors=factors).fold()
    used = {item.id for item in ast.walk(definition) if isinstance(item, ast.Name)}
    removed = [key for key in constants if key not in used]
    for call in found:
        _without(call, parameters, removed)
    _remove_parameters(definition, removed, found, calls)


def _arguments_of_calls(
    definition: ast.FunctionDef, calls: Calls, callers: dict[str, ast.AST]
) -> tuple[list[ast.Call], list[dict[str, Any]]]:
    """Returns the calls of a function in the source, and what each call gives for each parameter.

    There are none if that is not known of all of them.
    """
    parameters, defaults = _parameters(definition)
    found, values = [], []
    for tree in (*calls.trees, *callers.values(), definition):
        for call, is_call in _uses(tree, definition.name):
            if not is_call:
                return [], []  # passed as a value
            bound = _bound(call, parameters, defaults)
            if bound is None:
                if definition.name in calls.given:
                    continue  # said there
                return [], []
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
    return found, values


def _parameters(definition: ast.FunctionDef) -> tuple[list[str], dict[str, ast.expr]]:
    """Returns the parameters of a function, and the defaults of the last ones."""
    arguments = definition.args
    parameters = [item.arg for item in arguments.args]
    first = len(parameters) - len(arguments.defaults)
    return parameters, dict(zip(parameters[first:], arguments.defaults, strict=True))


def _own_names(definition: ast.FunctionDef) -> tuple[set[str], set[str]]:
    """Returns the variables that a function sets, and the parameters of the functions within it."""
    stored = {
        item.id for item in ast.walk(definition) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)
    }
    inner_names = {
        item.arg
        for inner in ast.walk(definition)
        if isinstance(inner, (ast.Lambda, ast.FunctionDef)) and inner is not definition
        for item in inner.args.args
    }
    return stored, inner_names


def _remove_parameters(definition: ast.FunctionDef, removed: list[str], found: list[ast.Call], calls: Calls) -> None:
    """Removes parameters, and the defaults of those that every call gives."""
    parameters, defaults = _parameters(definition)
    arguments = definition.args
    arguments.defaults = [value for key, value in defaults.items() if key not in removed]
    arguments.args = [item for item in arguments.args if item.arg not in removed]
    kept = [key for key in parameters if key not in removed]
    if definition.name not in calls.given:
        always = set(kept).intersection(*(_given(call, kept) for call in found))
        while arguments.defaults and kept[len(kept) - len(arguments.defaults)] in always:
            del arguments.defaults[0]
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


def _without(call: ast.Call, parameters: list[str], removed: list[str]) -> None:
    """Removes arguments from a call."""
    call.args = [value for key, value in zip(parameters, call.args, strict=False) if key not in removed]
    call.keywords = [item for item in call.keywords if item.arg not in removed]
