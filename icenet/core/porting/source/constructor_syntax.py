"""The constructors of the original as they are written: what they give to attributes, lists and variables."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass, field

from icenet.core.porting.statements import syntax_tree


@dataclass(frozen=True)
class Original:
    """A constructor of the original.

    Attributes:
        parameters: Its parameters, without `self`.
        defaults: Their default values.
        attributes: The values that it gives to attributes, by name.
        appended: The values that it appends to lists in attributes or variables.
        assigned: The values that it gives to variables.
        targets: The variables without a known value: those of loops, and those that are computed from themselves.
        functions: The functions of the file that return a call, such as `conv3x3`.
        calls: What it calls.
    """

    parameters: tuple[str, ...]
    defaults: dict[str, ast.expr]
    attributes: dict[str, list[ast.expr]] = field(default_factory=dict)
    appended: dict[str, list[ast.expr]] = field(default_factory=dict)
    assigned: dict[str, list[ast.expr]] = field(default_factory=dict)
    targets: set[str] = field(default_factory=set)
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    calls: list[ast.Call] = field(default_factory=list)

    def variable(self, name: str) -> ast.expr | None:
        """Returns the only value that the constructor gives to a variable."""
        values = self.assigned.get(name, [])
        return values[0] if len(values) == 1 and name not in self.parameters else None

    def source_of(self, key: str) -> str:
        """Returns the variable or attribute of which a variable is a copy; `key` itself if it is none."""
        while (variable := self.variable(key)) is not None and key_of(variable):
            key = key_of(variable)
        return key

    def gives(self, kind: str, number: int, parameter: str) -> bool:
        """Returns whether it gives a class an argument: the one with a number or a name."""
        for call in self.calls:
            if key_of(call.func).rpartition(".")[2] == kind:
                is_open = any(isinstance(item, ast.Starred) for item in call.args)
                if is_open or len(call.args) > number or any(item.arg in (parameter, None) for item in call.keywords):
                    return True
        return False


def key_of(node: ast.AST) -> str:
    """Returns a variable or an attribute as text, "dim" or "config.hidden_size"; empty for another node."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        outer = key_of(node.value)
        return f"{outer}.{node.attr}" if outer else ""
    return ""


def alternatives(node: ast.expr | None) -> list[ast.expr]:
    """Returns the expressions of which a value is one: those of `a or b` and of `a if c else b`."""
    if isinstance(node, ast.IfExp):
        return [*alternatives(node.body), *alternatives(node.orelse)]
    if isinstance(node, ast.BoolOp):
        return [inner for item in node.values for inner in alternatives(item)]
    return [node] if node is not None else []


def is_loop_variable(original: Original, key: str) -> bool:
    """Returns whether a variable is one of a loop, or a part of it."""
    return key.partition(".")[0] in original.targets


@functools.lru_cache(maxsize=512)
def original_at(file: str, line: int) -> Original | None:
    """Returns the constructor at a line of a file, None if there is none."""
    functions, constructors = _functions(file)
    node = constructors.get(line)
    return _original(node, functions) if node is not None else None


@functools.lru_cache(maxsize=64)
def _functions(file: str) -> tuple[dict[str, ast.FunctionDef], dict[int, ast.FunctionDef]]:
    """Returns the functions of a file that only return a call, by name, and the constructors by first line."""
    tree = syntax_tree(file)
    functions = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            body = [item for item in node.body if not isinstance(item, ast.Expr)]
            if len(body) == 1 and isinstance(body[0], ast.Return) and isinstance(body[0].value, ast.Call):
                functions[node.name] = node
    constructors = {
        min([node.lineno, *(item.lineno for item in node.decorator_list)]): node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    }
    return functions, constructors


def _original(function: ast.FunctionDef, functions: dict[str, ast.FunctionDef]) -> Original:
    given = function.args
    parameters = [*given.posonlyargs, *given.args]
    defaults = dict(zip([item.arg for item in parameters[::-1]], given.defaults[::-1], strict=False))
    for item, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        if default is not None:
            defaults[item.arg] = default
    names = [item.arg for item in (*parameters[1:], *given.kwonlyargs)]
    made = Original(tuple(names), defaults, functions=functions)
    changed: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, (ast.For, ast.comprehension)):
            made.targets.update(item.id for item in ast.walk(node.target) if isinstance(item, ast.Name))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                _note(made, target, node.value)
        elif isinstance(node, ast.Call):
            made.calls.append(node)
        elif isinstance(node, ast.AugAssign) and isinstance(node.value, ast.List):  # layers += [...]
            made.appended.setdefault(key_of(node.target).removeprefix("self."), []).extend(node.value.elts)
        elif isinstance(node, ast.AugAssign):
            made.targets.update(item.id for item in ast.walk(node.target) if isinstance(item, ast.Name))
            changed.add(key_of(node.target).removeprefix("self."))
        elif isinstance(node, ast.NamedExpr):
            _note(made, node.target, node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if node.func.attr in ("register_buffer", "register_parameter", "add_module") and len(node.args) > 1:
                if isinstance(name, str) and key_of(node.func.value) == "self":
                    made.attributes.setdefault(name, []).append(node.args[1])
            elif node.func.attr == "append" and len(node.args) == 1:
                holder = key_of(node.func.value).removeprefix("self.")
                made.appended.setdefault(holder, []).append(node.args[0])
    for name in changed & made.attributes.keys():
        del made.attributes[name]
    for name in _circular(made):
        made.targets.add(name)
        del made.assigned[name]
    return made


def _circular(made: Original) -> list[str]:
    """Returns the variables that are computed from themselves, as in `if h < w: h = w` and `else: w = h`."""
    read = {
        name: {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}
        for name in made.assigned
        if (value := made.variable(name)) is not None
    }
    found = []
    for name in read:
        left, seen = [name], set[str]()
        while left:
            for inner in read.get(left.pop(), set()) - seen:
                seen.add(inner)
                left.append(inner)
        if name in seen:
            found.append(name)
    return found


def _note(made: Original, target: ast.expr, value: ast.expr) -> None:
    """Notes what an assignment gives to attributes and variables."""
    if isinstance(target, ast.Tuple):
        if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
            for one, other in zip(target.elts, value.elts, strict=True):
                _note(made, one, other)
        else:
            made.targets.update(item.id for item in ast.walk(target) if isinstance(item, ast.Name))
    elif isinstance(target, ast.Name):
        made.assigned.setdefault(target.id, []).append(value)
    elif isinstance(target, ast.Subscript):  # layers[name] = ...
        made.appended.setdefault(key_of(target.value).removeprefix("self."), []).append(value)
    elif key_of(target).startswith("self."):
        made.attributes.setdefault(key_of(target).removeprefix("self."), []).append(value)
