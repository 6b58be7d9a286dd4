"""Numbers in the methods of a class that are attributes of the original: sizes of shapes, scales and rates."""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from icenet.core.porting.source.instances import NUMBER
from icenet.core.porting.source.lines import split
from icenet.core.porting.source.variants import OPEN
from icenet.core.porting.statements import place_at, syntax_tree

_SIZE = re.compile(
    r"head|dim|size|channel|emb|window|group|patch|hidden|scal|feature|width|state|rank|length|^(d|n|num)_|_(d|n)$"
)
"""Words in the names of attributes that are sizes or a scale."""
_USES_SIZES = re.compile(r"\.reshape\([^()]*$|\bscale=$")
"""What stands before the sizes of a shape, or a scale."""
_COMMON = {"2.0", "0.5"}
"""Numbers that are often in the formula of an operation: only a statement that reads an attribute has them of it."""


def known_numbers(
    text: str,
    start: int,
    settings: list[dict[str, Any]],
    taken: set[str],
    origins: list[Any],
) -> dict[int, str]:
    """Returns the attribute of the original that has a number in the methods, by the place of the number.

    Args:
        text: The constructor and the methods of an instance, one statement a line.
        start: The place of the first number of the methods.
        settings: The attributes of each instance that are numbers.
        taken: Names that the class has for something else.
        origins: The statements of the original that led to each line, None if they are not known.
    """
    found = {}
    for index, match in enumerate(NUMBER.finditer(text)):
        if index < start or match[0] in ("1", "0", "1.0", "0.0"):
            continue
        origin = origins[text.count("\n", 0, match.start())]
        line_start, line_end = text.rfind("\n", 0, match.start()) + 1, text.find("\n", match.start())
        before = text[line_start : match.start()]
        after = text[match.start() : line_end if line_end >= 0 else len(text)]
        if _USES_SIZES.search(before):
            key = _in_shape(before, after, match[0], settings, origin) if ".reshape(" in before else ""
            other = "" if key else _only_size(before, after, match[0], settings, taken)
            key = key or (other if _is_read(other, match[0], origin) else "")
        else:
            key = attribute_of((match[0],) * len(settings), settings, taken) if "." in match[0] else ""
            key = key if _is_read(key, match[0], origin, is_common=match[0] in _COMMON) else ""
        if key and key not in taken:
            found[index] = key
    return found


def known_formulas(
    text: str, start: int, columns: list[tuple[str, ...]], settings: list[dict[str, Any]], origins: list[Any]
) -> dict[int, tuple[str, list[str]]]:
    """Returns the formulas of the original that numbers in the methods are, such as `self.head_dim**-0.5`.

    Args:
        text, start, settings, origins: See `known_numbers`.
        columns: The numbers of each instance, by place.

    Returns:
        The formula and the attributes that it reads, by the place of the number.
    """
    found = {}
    for index, match in enumerate(NUMBER.finditer(text)):
        if index < start or not re.search(r"[.e]", match[0]) or match[0] in ("1.0", "0.0"):
            continue
        origin = origins[text.count("\n", 0, match.start())] or ()
        functions = [function for file, line in origin for function in _functions_at(file, line)]
        agreeing = {
            formula
            for function in functions
            for formula in function.formulas
            if all(_value(formula, item) == number for item, number in zip(settings, columns[index], strict=True))
        }
        if len(agreeing) == 1 and not any(function.numbers & {*columns[index]} for function in functions):
            formula = agreeing.pop()
            found[index] = formula, re.findall(r"self\.(\w+)", formula)
    return found


def _value(formula: str, settings: dict[str, Any]) -> str:
    """Returns the number that a formula is, empty if it has none."""
    names = {"__builtins__": {}, "math": math, "self": SimpleNamespace(**settings)}
    try:
        return repr(eval(formula, names))
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        return ""


def is_size(name: str) -> bool:
    """Returns whether an attribute is a size or a scale by its name."""
    return bool(_SIZE.search(name))


def _only_size(before: str, after: str, number: str, settings: list[dict[str, Any]], taken: set[str]) -> str:
    """Returns the only size that has a number which a shape has once."""
    shape = re.split(r"[()]", before)[-1] + re.split(r"[()]", after)[0]
    if len(re.findall(rf"(?<![\w.]){re.escape(number)}(?![\w.])", shape)) > 1:
        return ""  # one of them may have another meaning
    key = attribute_of((number,) * len(settings), settings, taken)
    return key if is_size(key) else ""


@dataclass(frozen=True)
class _Function:
    """What a function of the original has: the numbers that it writes, attributes with their lines, and formulas."""

    numbers: frozenset[str]
    attributes: frozenset[tuple[str, int]]
    formulas: frozenset[str]
    """Formulas of attributes, in parentheses where they need them."""


def _is_read(name: str, number: str, origin: Any, is_common: bool = False) -> bool:
    """Returns whether the original reads an attribute where a number comes from, and does not write the number.

    Args:
        name: The attribute.
        number: The number.
        origin: The statements of the original, from the outermost call to the innermost.
        is_common: Whether the statement itself must read the attribute, not only its function.
    """
    if not name or not origin:
        return False
    found = [(line, function) for file, line in origin for function in _functions_at(file, line)]
    if any(number in function.numbers for _, function in found):
        return False
    return any(
        key == name and (not is_common or at == line) for line, function in found for key, at in function.attributes
    )


@functools.lru_cache(maxsize=4096)
def _functions_at(file: str, line: int) -> tuple[_Function, ...]:
    """Returns the innermost function around a line of a file; none outside of functions."""
    around = [item for item in _all_functions(file) if item[0] <= line <= item[1]]
    return (max(around, key=lambda item: item[0])[2],) if around else ()


@functools.lru_cache(maxsize=64)
def _all_functions(file: str) -> list[tuple[int, int, _Function]]:
    """Returns the functions of a file: first line, last line, and what each reads."""
    found = []
    for node in ast.walk(syntax_tree(file)):
        if isinstance(node, ast.FunctionDef):
            inner = [*ast.walk(node)]
            formulas = [item for item in inner if isinstance(item, (ast.BinOp, ast.Call)) and _is_formula(item)]
            within = {id(part) for item in formulas for part in ast.walk(item)}
            within |= {id(part) for item in inner for part in _exponent(item)}
            numbers = frozenset(
                repr(item.value) for item in inner if isinstance(item, ast.Constant) and id(item) not in within
            )
            read = [(item.attr, item.lineno) for item in inner if isinstance(item, ast.Attribute)]
            attributes = frozenset((name, place_at(file, line).line) for name, line in read)
            found.append(
                (node.lineno, node.end_lineno or node.lineno, _Function(numbers, attributes, _texts(formulas)))
            )
    return found


def _exponent(node: ast.AST) -> list[ast.AST]:
    return [*ast.walk(node.right)] if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) else []


def _is_formula(node: ast.AST) -> bool:
    """Returns whether an expression consists of attributes of `self`, with one at least, and numbers."""
    parts = [item for item in ast.walk(node) if not isinstance(item, (ast.operator, ast.unaryop, ast.expr_context))]
    reads = [item for item in parts if isinstance(item, ast.Attribute)]
    roots = [item for item in parts if isinstance(item, ast.Name)]
    functions = [ast.unparse(item.func) for item in parts if isinstance(item, ast.Call)]
    return (
        all(
            isinstance(item, (ast.BinOp, ast.UnaryOp, ast.Constant, ast.Attribute, ast.Name, ast.Call))
            for item in parts
        )
        and all(type(item.value) in (int, float) for item in parts if isinstance(item, ast.Constant))
        and all(name == "math.sqrt" for name in functions)
        and len(reads) == len(roots) > len(functions)
        and all(item.id == "self" for item in roots if item.id != "math")
    )


def _texts(formulas: list[ast.BinOp | ast.Call]) -> frozenset[str]:
    return frozenset(
        ast.unparse(item) if isinstance(item, ast.Call) or isinstance(item.op, ast.Pow) else f"({ast.unparse(item)})"
        for item in formulas
    )


def _in_shape(before: str, after: str, number: str, settings: list[dict[str, Any]], origin: Any) -> str:
    """Returns the attribute in the place of a number of a shape, as the original has it."""
    if not origin:
        return ""
    inside = before.rpartition(".reshape(")[2]
    place = len(split(inside + "0")) - 1
    length = len(split((inside + after).partition(")")[0]))
    shapes = [shape for shape in _shapes(*origin[-1]) if len(shape) == length]
    keys = {shape[place] for shape in shapes}
    key = keys.pop().removeprefix("self.") if len(keys) == 1 else ""
    return key if key.isidentifier() and all(repr(item.get(key)) == number for item in settings) else ""


@functools.lru_cache(maxsize=4096)
def _shapes(file: str, line: int) -> tuple[tuple[str, ...], ...]:
    """Returns the shapes to which the statement at a line brings values, each as the texts of its sizes."""
    return tuple(shape for first, last, shape in _all_shapes(file) if first <= line <= last)


@functools.lru_cache(maxsize=64)
def _all_shapes(file: str) -> tuple[tuple[int, int, tuple[str, ...]], ...]:
    found = []
    for node in ast.walk(syntax_tree(file)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("view", "reshape")
        ):
            given = node.args
            if len(given) == 1 and isinstance(given[0], (ast.Tuple, ast.List)):
                given = given[0].elts
            place = place_at(file, node.lineno)
            found.append(
                (min(place.line, node.lineno), node.end_lineno or node.lineno, tuple(map(ast.unparse, given)))
            )
    return tuple(found)


def _fits(column: tuple[str, ...], values: Iterable[Any]) -> bool:
    """Returns whether the instances have some numbers; one that lacks the place may have any."""
    is_float = any("." in text for text in column)
    return all(text == repr(value) or (is_float and text == OPEN) for text, value in zip(column, values, strict=True))


def attribute_of(column: tuple[str, ...], settings: list[dict[str, Any]], taken: set[str]) -> str:
    """Returns the only attribute of the original that has the numbers of a column, empty without one."""
    found = [name for name in settings[0] if _fits(column, [item.get(name) for item in settings])]
    return found[0] if len(found) == 1 and found[0] not in taken and not found[0].startswith("_") else ""


def formula_of(column: tuple[str, ...], settings: list[dict[str, Any]]) -> tuple[str, tuple[str, ...], str] | None:
    """Returns the only attribute x for which the numbers of a column are -x or 1 - x; None without one.

    Returns:
        The attribute, its numbers, and how a number is written with it, such as "(1 - {})".
    """
    found = []
    for name in settings[0]:
        values: list[Any] = [item.get(name) for item in settings]
        if name.startswith("_") or any(type(value) not in (int, float) for value in values):
            continue
        rests = [1 - value if type(value) is float else None for value in values]
        for form, numbers in (("-{}", [-value for value in values]), ("(1 - {})", rests)):
            if _fits(column, numbers):
                found.append((name, tuple(map(repr, values)), form))
    return found[0] if len(found) == 1 else None
