"""What the calls of helper functions say about their arguments: whether they are arrays, their axes and dtypes."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from icenet.core.porting.record import Tensor

NUMBER = "number"
_CATEGORIES = ["bool", "integer", "floating", "complexfloating"]
"""The kinds of dtypes, in the order of promotion."""


_ORDERS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True)
class Kind:
    """What is known about an argument."""

    category: str
    """The kind of its dtype, or NUMBER for a number of Python."""
    ndim: int | None = None
    is_empty: bool | None = None


class Helpers(set[str]):
    """The names of the helper functions of a source, and what is known about the arguments of their calls.

    Args:
        names: Functions about whose calls nothing is known.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        super().__init__(names)
        self.arguments: dict[str, list[tuple[list[Kind | None], dict[str, Kind | None]]]] = {}
        """The positional arguments and the keywords of each call by the name of the function."""
        self.unknown: set[str] = set(names)
        """Functions with other calls, too."""

    def add(self, name: str) -> None:
        self.unknown.add(name)
        super().add(name)

    def called(self, name: str, arguments: list[Kind | None], keywords: dict[str, Kind | None]) -> None:
        """Notes a call."""
        super().add(name)
        self.arguments.setdefault(name, []).append((arguments, keywords))

    def of(self, name: str, parameters: list[str]) -> list[dict[str, Kind | None]]:
        """Returns what each call gives to the parameters of a function."""
        return [
            dict(zip(parameters, arguments, strict=False)) | keywords
            for arguments, keywords in self.arguments.get(name, [])
        ]


def kind(tensor: object) -> Kind | None:
    """Returns what is known about a value of the graph: a Tensor, or the expression of a size."""
    if isinstance(tensor, str):
        return Kind(NUMBER)
    if not isinstance(tensor, Tensor):
        return None
    is_empty = None if any(isinstance(size, str) for size in tensor.shape) else 0 in tensor.shape
    return Kind(category(tensor.dtype), tensor.ndim, is_empty)


def category(dtype: str) -> str:
    """Returns the kind of a dtype by its name."""
    if dtype.startswith("bool"):
        return "bool"
    if dtype.startswith("complex"):
        return "complexfloating"
    return "floating" if dtype.startswith(("float", "bfloat")) else "integer"


def common(kinds: list[Kind | None]) -> Kind | None:
    """Returns what several calls have in common."""
    first, *others = kinds
    for other in others:
        if first is None or other is None or first.category != other.category:
            return None
        first = Kind(
            first.category,
            first.ndim if first.ndim == other.ndim else None,
            first.is_empty if first.is_empty == other.is_empty else None,
        )
    return first


def of_expression(value: ast.expr, kinds: dict[str, Kind]) -> Kind | None:
    """Returns what is known about an expression, given what is known about the variables."""
    if isinstance(value, ast.Name):
        return kinds.get(value.id)
    if isinstance(value, ast.Constant) and isinstance(value.value, (int, float)):
        return Kind(NUMBER)
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute) or not value.args:
        return None
    name, last = ast.unparse(value.func), value.args[-1]
    dtype = ast.unparse(last).removeprefix("mx.")
    is_dtype = isinstance(last, ast.Attribute) and dtype.startswith(("bool_", "int", "uint", "float", "complex"))
    if name == "mx.stop_gradient":
        return of_expression(value.args[0], kinds)
    if name == "mx.array" and len(value.args) == 2 and is_dtype:
        return Kind(category(dtype))
    if value.func.attr == "astype" and len(value.args) == 1 and is_dtype:
        before = of_expression(value.func.value, kinds)
        return Kind(category(dtype), *((before.ndim, before.is_empty) if before is not None else ()))
    return None


def truth(test: ast.expr, kinds: dict[str, Kind]) -> bool | None:
    """Returns the value of a condition on the axes or the dtype of an array, None if it is not known."""
    if isinstance(test, ast.Call):
        name, arguments = ast.unparse(test.func), test.args
        if name == "isinstance" and ast.unparse(arguments[1]) == "mx.array":
            found = of_expression(arguments[0], kinds)
            return None if found is None else found.category != NUMBER
        wanted = ast.unparse(arguments[1]).removeprefix("mx.") if name == "mx.issubdtype" else ""
        of_dtype = _category(arguments[0], kinds) if wanted in _CATEGORIES else None
        return None if of_dtype is None else of_dtype == wanted
    if not isinstance(test, ast.Compare) or len(test.ops) != 1 or not isinstance(test.left, ast.Attribute):
        return None
    known, comparison, right = of_expression(test.left.value, kinds), test.ops[0], test.comparators[0]
    order = _ORDERS.get(type(comparison))
    if order and isinstance(right, ast.Constant) and test.left.attr == "ndim" and known and known.ndim is not None:
        return order(known.ndim, right.value)
    is_equal: bool | None = None
    if (
        known is None
        or known.category == NUMBER
        or not isinstance(comparison, (ast.Eq, ast.NotEq, ast.In, ast.NotIn))
    ):
        return None
    if isinstance(right, ast.Constant) and test.left.attr == "ndim" and known.ndim is not None:
        is_equal = known.ndim == right.value
    elif isinstance(right, ast.Constant) and test.left.attr == "size" and right.value == 0:
        is_equal = known.is_empty
    elif test.left.attr == "dtype":
        names = right.elts if isinstance(right, ast.Tuple) else [right]
        others = {category(ast.unparse(item).removeprefix("mx.")) for item in names}
        if known.category not in others:
            is_equal = False
        elif known.category == "bool":
            is_equal = True
    if is_equal is None:
        return None
    return is_equal == isinstance(comparison, (ast.Eq, ast.In))


def _category(dtype: ast.expr, kinds: dict[str, Kind]) -> str | None:
    """Returns the kind of `x.dtype` or `mx.result_type(x, y)`."""
    arrays: list[ast.expr] = []
    if isinstance(dtype, ast.Attribute) and dtype.attr == "dtype":
        arrays = [dtype.value]
    elif isinstance(dtype, ast.Call) and ast.unparse(dtype.func) == "mx.result_type":
        arrays = dtype.args
    found = [of_expression(item, kinds) for item in arrays]
    categories = [item.category for item in found if item is not None and item.category != NUMBER]
    if not arrays or len(categories) < len(arrays):
        return None
    return max(categories, key=_CATEGORIES.index)
