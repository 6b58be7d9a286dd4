"""Sizes as the original writes them: `C // self.num_heads` in the place of a number in a shape or a scale."""

from __future__ import annotations

import ast
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from icenet.core.porting.graph.calls import Call
from icenet.core.porting.record import Node, Tensor
from icenet.core.porting.source.lines import RESERVED
from icenet.core.porting.source.size_variables import SizeVariables
from icenet.core.porting.source.structure import METHODS, Structure
from icenet.core.porting.source.values import Values
from icenet.core.porting.statements import place_at, syntax_tree

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
_SHAPED = {"view": 0, "reshape": 0, "expand": 0, "zeros": 0, "ones": 0, "full": 0}
"""Functions of torch with a shape, and of mlx.core: the place of the shape, or of the first of its sizes."""
_WRITTEN = {"reshape": 0, "zeros": 0, "ones": 0, "full": 0, "broadcast_to": 1}
_MOST = 16
"""How many meanings of an expression are tried."""


@dataclass(frozen=True)
class _Statement:
    """A statement of the original: the shapes to which it brings values, and the arithmetic in it."""

    first: int
    last: int
    shapes: tuple[tuple[ast.expr, ...], ...]
    arithmetic: tuple[ast.expr, ...]


@dataclass(frozen=True)
class _Function:
    """A function of the original: its lines, and the only value of each variable that has one."""

    first: int
    last: int
    variables: dict[str, ast.expr]


class WrittenSizes(SizeVariables):
    """Writes sizes that are numbers in this port as the original does, where they have the same value."""

    def __init__(self, structure: Structure, graph: Values, call: Call) -> None:
        super().__init__(structure, graph, call)
        owner = structure.modules.get(structure.outer(call.path))
        settings = owner.settings if owner is not None else {}
        self.numbers = {
            name: value
            for name, value in settings.items()
            if type(value) in (int, float) and not name.startswith("_") and name not in METHODS
        }

    def with_written_sizes(self, node: Node, text: str) -> str:
        """Returns the source of an operation with the sizes and scales of the original's statement."""
        if node.place is None or not any(letter.isdigit() for letter in text):
            return text
        statement = _statement_at(node.place.file, node.place.line)
        if statement is None or not (statement.shapes or statement.arithmetic):
            return text
        try:
            tree = ast.parse(text, mode="eval").body
        except SyntaxError:
            return text
        variables = _variables_at(node.place.file, node.place.line)
        found: dict[tuple[int, int], str] = {}
        for part in ast.walk(tree):
            for item, expressions in self.candidates(part, statement):
                number = item.value
                assert isinstance(number, (int, float))
                written = {self.written(expression, variables, number) for expression in expressions} - {""}
                if len(written) == 1 and item.end_col_offset is not None:
                    found[item.col_offset, item.end_col_offset] = written.pop()
        for (start, end), code in sorted(found.items(), reverse=True):
            text = text[:start] + code + text[end:]
        return text

    def candidates(self, part: ast.AST, statement: _Statement) -> Iterator[tuple[ast.Constant, list[ast.expr]]]:
        """Yields the numbers of a part of an expression, with what the original may have in the place of each."""
        if isinstance(part, ast.Constant) and type(part.value) is float and part.value not in (0.0, 1.0):
            yield part, list(statement.arithmetic)
        name = part.func.attr if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute) else ""
        if not isinstance(part, ast.Call) or name not in _WRITTEN:
            return
        sizes = _sizes(part.args[_WRITTEN[name] :])
        equal = [shape for shape in statement.shapes if len(shape) == len(sizes)]
        for place, item in enumerate(sizes):
            texts = {ast.unparse(shape[place]) for shape in equal}
            if isinstance(item, ast.Constant) and type(item.value) is int and len(texts) == 1:
                yield item, [equal[0][place]]

    def written(self, expression: ast.expr, variables: dict[str, ast.expr], number: float) -> str:
        """Returns the source of an expression of the original that has a number, empty without one."""
        if isinstance(expression, ast.Constant):
            return ""
        for code, value, named in itertools.islice(self.meanings(expression, variables, 0), _MOST):
            if repr(value) == repr(number):
                for name, names, axis in named:
                    names[axis] = name
                    self.names[name] = f"size {name}"
                    self.last_use[f"size {name}"] = len(self.items) + 1
                text = ast.unparse(code)
                return f"({text})" if isinstance(code, ast.BinOp) and type(number) is float else text
        return ""

    def meanings(
        self, node: ast.expr, variables: dict[str, ast.expr], depth: int
    ) -> Iterator[tuple[ast.expr, Any, list[tuple[str, list[str], int]]]]:
        """Yields what an expression may be here: its source, its value, and the axes that get variables."""
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield node, node.value, []
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            if node.attr in self.numbers:
                yield node, self.numbers[node.attr], []
        elif isinstance(node, ast.Name) and node.id in variables and depth < 3:
            value = variables[node.id]
            if _axis_of(value) is not None:
                yield from self.named_axes(node.id, value)
            yield from self.meanings(value, variables, depth + 1)
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            for left, a, some in self.meanings(node.left, variables, depth):
                for right, b, others in self.meanings(node.right, variables, depth):
                    try:
                        value = _OPERATORS[type(node.op)](a, b)
                    except (ArithmeticError, ValueError):
                        continue
                    yield ast.BinOp(left, node.op, right), value, [*some, *others]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "math.sqrt" and len(node.args) == 1:
            for inner, value, named in self.meanings(node.args[0], variables, depth):
                if value >= 0:
                    yield ast.Call(node.func, [inner], []), math.sqrt(value), named
        else:
            yield from self.axis(node)

    def named_axes(
        self, name: str, value: ast.expr
    ) -> Iterator[tuple[ast.expr, Any, list[tuple[str, list[str], int]]]]:
        """Yields the axes of an argument that may have the variable of the original: `C` in `B, T, C = x.shape`."""
        source, _ = _axis_of(value) or ("", 0)
        name = name.upper() if len(name) == 1 else name  # as B and T are
        held = self.names.get(name, f"size {name}")
        if name in RESERVED or name in METHODS or held != f"size {name}":
            return
        for _, text, names, tensor in self.unpackings:
            for axis, size in enumerate(tensor.shape):
                if text == source and isinstance(size, int) and names[axis] in ("_", name):
                    yield ast.Name(name), size, [(name, names, axis)]

    def axis(self, node: ast.expr) -> Iterator[tuple[ast.expr, Any, list[tuple[str, list[str], int]]]]:
        """Yields the size of an axis of a variable that the statement can read: `k.shape[-1]`."""
        source, axis = _axis_of(node) or ("", 0)
        tensor = self.graph.tensors.get(self.names.get(source, ""))
        if isinstance(tensor, Tensor) and -tensor.ndim <= axis < tensor.ndim and source.isidentifier():
            size = tensor.shape[axis]
            if isinstance(size, int) and self.is_live_here(source):
                yield ast.parse(f"{source}.shape[{axis}]", mode="eval").body, size, []

    def is_live_here(self, variable: str) -> bool:
        """Returns whether a variable still has its value in the present statement."""
        return self.last_use.get(self.names[variable], -1) >= self.position


def _axis_of(node: ast.expr) -> tuple[str, int] | None:
    """Returns the variable and the axis of `x.shape[1]` and `x.size(1)`, None for another expression."""
    holder, index = None, None
    if isinstance(node, ast.Subscript):
        holder, index = node.value, node.slice
        holder = holder.func if isinstance(holder, ast.Call) and not holder.args else holder
    elif isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        holder, index = node.func, node.args[0]
    if not isinstance(holder, ast.Attribute) or holder.attr not in ("shape", "size") or index is None:
        return None
    try:
        number = ast.literal_eval(index)
    except ValueError:
        return None
    return (ast.unparse(holder.value), number) if type(number) is int else None


def _sizes(given: list[ast.expr]) -> list[ast.expr]:
    """Returns the sizes of a shape, which is the first of some arguments or all of them."""
    return given[0].elts if given and isinstance(given[0], (ast.Tuple, ast.List)) else given


@functools.lru_cache(maxsize=4096)
def _statement_at(file: str, line: int) -> _Statement | None:
    return next((item for item in _statements(file) if item.first <= line <= item.last), None)


@functools.lru_cache(maxsize=64)
def _statements(file: str) -> tuple[_Statement, ...]:
    """Returns the statements of a file that have shapes or scales."""
    shapes: dict[tuple[int, int], list[tuple[ast.expr, ...]]] = {}
    scales: dict[tuple[int, int], list[ast.expr]] = {}
    for node in ast.walk(syntax_tree(file)):
        if not isinstance(node, (ast.Call, ast.BinOp)):
            continue
        place = place_at(file, node.lineno)
        span = min(place.line, node.lineno), node.end_lineno or node.lineno
        name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
        if isinstance(node, ast.Call) and name in _SHAPED:
            shapes.setdefault(span, []).append(tuple(_sizes(node.args)))
        if _is_scale(node):
            scales.setdefault(span, []).append(node)
    return tuple(
        _Statement(*span, tuple(shapes.get(span, ())), tuple(scales.get(span, ())))
        for span in sorted({*shapes, *scales})
    )


def _is_scale(node: ast.AST) -> bool:
    """Returns whether an expression has a root or a power of a size: `1.0 / math.sqrt(k.size(-1))`."""
    return any(
        (isinstance(part, ast.Call) and ast.unparse(part.func) == "math.sqrt")
        or (isinstance(part, ast.BinOp) and isinstance(part.op, ast.Pow) and not isinstance(part.left, ast.Constant))
        for part in ast.walk(node)
    )


def _variables_at(file: str, line: int) -> dict[str, ast.expr]:
    """Returns the values of the variables of the innermost function around a line."""
    around = [item for item in _functions(file) if item.first <= line <= item.last]
    return max(around, key=lambda item: item.first).variables if around else {}


@functools.lru_cache(maxsize=64)
def _functions(file: str) -> tuple[_Function, ...]:
    return tuple(
        _Function(node.lineno, node.end_lineno or node.lineno, _variables(node))
        for node in ast.walk(syntax_tree(file))
        if isinstance(node, ast.FunctionDef)
    )


def _variables(function: ast.FunctionDef) -> dict[str, ast.expr]:
    """Returns the variables of a function to which it gives one value only."""
    found: dict[str, list[ast.expr]] = {item.arg: [ast.Constant(None)] for item in function.args.args}
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            for name, value in _assigned(target, node.value):
                found.setdefault(name, []).append(value)
    return {name: values[0] for name, values in found.items() if len({*map(ast.unparse, values)}) == 1}


def _assigned(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Yields the variables that an assignment sets, each with its value: `x.shape[2]` of `B, T, C = x.shape`."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple):
        for index, item in enumerate(target.elts):
            if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
                yield from _assigned(item, value.elts[index])
            elif isinstance(item, ast.Name):
                holder = value.func if isinstance(value, ast.Call) and not value.args else value
                yield item.id, ast.Subscript(holder, ast.Constant(index))
