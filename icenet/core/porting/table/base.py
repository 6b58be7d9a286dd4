"""The table of ATen operations: the MLX source of each. A module of this folder per subject adds its entries."""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Callable
from typing import Any

from icenet.core.porting.kinds import NUMBER, Helpers, Kind, kind
from icenet.core.porting.record import Dtype, Node, Ref, Tensor

Entry = Callable[["Operation"], str]

TABLE: dict[str, Entry] = {}
"""The entries by the name of the operation without its overload."""

MLX_DTYPES = {
    "float64": "float32",  # MLX computes it on a CPU only
    "complex128": "complex64",
    "complex32": "complex64",
    "bool": "bool_",
}


def mlx_dtype(name: str) -> str:
    """Returns the name of a dtype in `mlx.core`."""
    return MLX_DTYPES.get(name, name)


def entry(*names: str) -> Callable[[Entry], Entry]:
    """Adds a function to the table under the names of operations."""

    def add(function: Entry) -> Entry:
        for name in names:
            assert name not in TABLE, name
            TABLE[name] = function
        return function

    return add


def templates(rows: dict[str, str]) -> None:
    """Adds rows: an operation, and its source with {argument} for raw text and {argument!a} for an operand."""
    for name, text in rows.items():
        assert name not in TABLE, name
        TABLE[name] = functools.partial(_fill, text)


def _fill(text: str, n: Operation) -> str:
    return re.sub(r"\{(\w+)(!a)?\}", lambda m: n.atom(m[1]) if m[2] else n[m[1]], text)


@functools.lru_cache(maxsize=65536)
def is_atom(text: str) -> bool:
    """Returns whether an expression needs no parentheses as an operand."""
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:
        return False
    return isinstance(node, (ast.Name, ast.Call, ast.Attribute, ast.Subscript, ast.List, ast.Tuple, ast.Constant))


def atom(text: str) -> str:
    """Returns an expression as an operand of an attribute or an operator."""
    return text if is_atom(text) else f"({text})"


_ORDER = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]


def promoted(a: str, b: str) -> str:
    """Returns the dtype of an MLX operation on arrays of two dtypes."""
    if a == b:
        return a
    pair = {a, b}
    for complex_name in ("complex64", "complex128"):
        if complex_name in pair:
            return "complex64"
    floats = [name for name in (a, b) if name.startswith(("float", "bfloat"))]
    if len(floats) == 2:
        return "float32"
    if floats:
        return floats[0]
    if "bool" in pair:
        return a if b == "bool" else b
    signed = [name for name in (a, b) if name.startswith("int")]
    if len(signed) == 1:
        other = b if a == signed[0] else a
        bits = max(int(signed[0][3:]), 2 * int(other[4:]))
        return f"int{bits}" if bits <= 64 else "float32"
    return a if int(a.strip("uint")) > int(b.strip("uint")) else b


class Operation:
    """One operation as its entry sees it: the source of each argument, and what is known about its value.

    Args:
        node: The operation.
        source: Returns the source of a value.
        tensors: Returns what a value is, by its name.
        uses: The helper functions that the source calls; an entry adds to them.
        training: Whether the graph is that of training mode.
    """

    def __init__(
        self,
        node: Node,
        source: Callable[[Any], str],
        tensors: Callable[[str], Any],
        uses: Helpers,
        training: bool = False,
    ) -> None:
        self.node, self.args, self.training = node, node.args, training
        self._source, self._tensors, self._uses = source, tensors, uses
        self._kinds: dict[str, Kind | None] = {}
        self._is_changed = False

    def changed(self, args: dict[str, Any] | None = None, source: Callable[[Any], str] | None = None) -> Operation:
        """Returns the operation with other arguments, or another source of values."""
        other = Operation(self.node, source or self._source, self._tensors, self._uses, self.training)
        other.args = self.args if args is None else args
        other._is_changed = self._is_changed or source is not None
        return other

    def helper(self, name: str) -> str:
        """Returns the name of a helper function, whose source the file will have."""
        self._uses.add(name)
        return name

    @property
    def out(self) -> Tensor:
        out = self.node.out
        if isinstance(out, list):
            out = next(item for item in out if isinstance(item, Tensor))
        return out

    def __getitem__(self, name: str) -> str:
        return self.source(self.args[name])

    def indexed(self, name: str, ndim: int, dim: int, text: str) -> str:
        """Returns the source of an index at one axis of an argument; joined with the slices of earlier axes."""
        base = self.atom(name)
        match = re.fullmatch(r"(.+)\[([^\[\]]*(?:\.shape\[\d\][^\[\]]*)*)\]", base)
        parts = [part.strip() for part in match[2].split(",")] if match else []
        if match and len(parts) <= dim and all(":" in part for part in parts):
            return f"{match[1]}[{', '.join([*parts, *[':'] * (dim - len(parts)), text])}]"
        if dim == ndim - 1 and dim > 1:
            return f"{base}[..., {text}]"
        return f"{base}[{', '.join([':'] * dim + [text])}]"

    def source(self, value: Any) -> str:
        """Returns the source of an argument."""
        if isinstance(value, Ref):
            text = self._source(value)
            self._kinds[text] = kind(self._tensors(value.name))
            return text
        if isinstance(value, Dtype):
            return f"mx.{mlx_dtype(value.name)}"
        if isinstance(value, (list, tuple)):
            inner = [self.source(item) for item in value]
            return f"[{', '.join(inner)}]"
        if isinstance(value, float):
            if math.isinf(value) or math.isnan(value):
                return f'float("{value}")'
            return repr(value)
        return repr(value)

    def atom(self, name: str) -> str:
        """Returns the source of an argument as an operand."""
        return atom(self[name])

    def get(self, name: str, default: Any = None) -> Any:
        """Returns an argument as it was recorded."""
        value: Any = self.args.get(name)
        return default if value is None else value

    def tensor(self, name: str) -> Tensor | None:
        """Returns shape and dtype of an argument, None for a number."""
        return self.of(self.args.get(name))

    def of(self, value: Any) -> Tensor | None:
        found = self._tensors(value.name) if isinstance(value, Ref) else None
        return found if isinstance(found, Tensor) else None

    def size(self, ref: Ref) -> Any:
        """Returns a size as an expression, such as `s0 // 2`."""
        return self._tensors(ref.name)

    def cast(self, name: str, dtype: str) -> str:
        """Returns the source of an argument in a dtype."""
        tensor = self.tensor(name)
        if tensor is None or mlx_dtype(tensor.dtype) == mlx_dtype(dtype):
            return self[name]
        text = f"{self.atom(name)}.astype(mx.{mlx_dtype(dtype)})"
        self._kinds[text] = kind(Tensor(tensor.shape, dtype))
        return text

    def dims(self, name: str = "dim", of: str = "self") -> str:
        """Returns the source of axes: a number, a tuple, or None for all."""
        value = self.args.get(name)
        tensor = self.tensor(of)
        if value is None or value == [] or (tensor is not None and tensor.ndim == 0):
            return "None"
        if isinstance(value, (list, tuple)):
            if len(value) == 1:
                return self.source(value[0])
            return f"({', '.join(map(self.source, value))})"
        return self.source(value)

    def call(self, name: str, *arguments: str, **keywords: Any) -> str:
        """Returns the source of a call of a helper function."""
        given = [
            *arguments,
            *(f"{key}={value if isinstance(value, str) else self.source(value)}" for key, value in keywords.items()),
        ]
        named = {key: self.kind(value) for key, value in keywords.items() if isinstance(value, str)}
        self._uses.called(name, [self.kind(item) for item in arguments], named)
        return f"{name}({', '.join(given)})"

    def kind(self, text: str) -> Kind | None:
        """Returns what is known about an argument of a helper function, by its source."""
        if re.fullmatch(r"-?\d+(\.\d*)?(e-?\d+)?", text):
            return Kind(NUMBER)
        if self._is_changed:  # the source of an argument may be another array
            return None
        return self._kinds.get(text[1:-1] if text not in self._kinds and text.startswith("(") else text)


def in_floating_point(function: Entry) -> Entry:
    """Returns an entry that computes integers in float32, for operations that MLX has in floating point only."""

    @functools.wraps(function)
    def write(n: Operation) -> str:
        if n.out.is_floating or n.out.is_complex:
            return function(n)

        def source(ref: Ref) -> str:
            text = n._source(ref)
            return f"{atom(text)}.astype(mx.float32)" if n.of(ref) is not None else text

        return f"{atom(function(n.changed(source=source)))}.astype(mx.{mlx_dtype(n.out.dtype)})"

    return write


def flag(n: Operation, name: str) -> bool:
    return bool(n.args.get(name))


def shape_source(n: Operation, sizes: Any) -> str:
    """Returns the source of sizes as arguments of `reshape`."""
    return ", ".join(n.source(size) for size in sizes)


def number(n: Operation, text: str, other: str) -> str:
    """Returns an array of one number as the number, if another argument has the dtype of the result and axes."""
    tensor = n.tensor(other)
    found = re.fullmatch(rf"mx\.array\(([^\[\]]+), mx\.{mlx_dtype(n.out.dtype)}\)", text)
    return found[1] if found and tensor is not None and tensor.ndim and tensor.dtype == n.out.dtype else text


def helper_entry(*names: str, function: str = "", arguments: tuple[str, ...] = ("self",)) -> None:
    """Adds operations that a function of `icenet/porting/functions` computes.

    An array of integers is cast where the result is a float.

    Args:
        names: The operations.
        function: Name of the function; by default that of the operation.
        arguments: The arguments of the operation that the function takes.
    """

    def write(n: Operation) -> str:
        tensor = n.tensor("self")
        is_integer = tensor is not None and not tensor.is_floating and not tensor.is_complex
        first = n.cast("self", n.out.dtype) if is_integer and n.out.is_floating else n["self"]
        rest = [n[name] for name in arguments[1:]]
        return n.call(function or n.node.base, first, *rest)

    entry(*names)(write)


def training_flag(n: Operation, name: str = "training") -> str:
    """Returns the source of a flag that follows the mode."""
    value = n.args.get(name, n.args.get("train"))
    return "self.training" if value is n.training else repr(value)
