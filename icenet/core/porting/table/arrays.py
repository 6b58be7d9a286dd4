"""New arrays: of one value, of the shape of another one, of ranges, of powers."""

from __future__ import annotations

from typing import Any

from icenet.core.porting.graph.dtypes import MADE_IN
from icenet.core.porting.table.base import Operation, entry, mlx_dtype


def tuple_source(n: Operation, values: Any) -> str:
    """Returns the source of a tuple."""
    return f"({', '.join(map(n.source, values))}{',' if len(values) == 1 else ''})"


def sizes_of(n: Operation, name: str = "size") -> str:
    """Returns the source of the sizes of an argument, as a tuple."""
    return tuple_source(n, n.args[name])


def dtype_option(n: Operation) -> str:
    """Returns the dtype of the result as a further argument, empty for float32."""
    dtype = n.get(MADE_IN) or mlx_dtype(n.out.dtype)
    return "" if dtype == "float32" else f", mx.{dtype}"


def fill_value(n: Operation, value: Any) -> str:
    """Returns the source of the value of all elements. MLX keeps a number other than 0 and 1 as a boolean."""
    return repr(bool(value)) if n.out.dtype == "bool" and isinstance(value, (int, float)) else n.source(value)


@entry("zeros", "empty", "new_zeros", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted")
def zeros(n: Operation) -> str:
    return f"mx.zeros({sizes_of(n)}{dtype_option(n)})"


@entry("ones", "new_ones")
def ones(n: Operation) -> str:
    return f"mx.ones({sizes_of(n)}{dtype_option(n)})"


@entry("full", "new_full")
def full(n: Operation) -> str:
    value = n.args["fill_value"]
    dtype = dtype_option(n) or ("" if isinstance(value, float) else ", mx.float32")
    return f"mx.full({sizes_of(n)}, {fill_value(n, value)}{dtype})"


@entry("copy")
def copy(n: Operation) -> str:
    """The values of src in the shape and dtype of self."""
    source, target = n.tensor("src"), n.tensor("self")
    text = n.cast("src", n.out.dtype)
    if source is None or target is None or source.shape != target.shape:
        return n.call("broadcast_like", text, n["self"])
    return text


@entry("fill")
def fill(n: Operation) -> str:
    value = n.args["value"]
    if n.tensor("value") is not None:
        return n.call("broadcast_like", n.cast("value", n.out.dtype), n["self"])
    return f"mx.full({n.atom('self')}.shape, {fill_value(n, value)}, mx.{mlx_dtype(n.out.dtype)})"


entry("zero")(lambda n: f"mx.zeros_like({n['self']})")
entry("zeros_like")(lambda n: _like(n, "mx.zeros"))
entry("ones_like")(lambda n: _like(n, "mx.ones"))
entry("empty_like")(lambda n: _like(n, "mx.zeros"))


def _like(n: Operation, function: str) -> str:
    tensor = n.tensor("self")
    if tensor is not None and tensor.dtype == n.out.dtype:
        return f"{function}_like({n['self']})"
    return f"{function}({n.atom('self')}.shape, mx.{mlx_dtype(n.out.dtype)})"


@entry("full_like")
def full_like(n: Operation) -> str:
    return f"mx.full({n.atom('self')}.shape, {fill_value(n, n.args['fill_value'])}, mx.{mlx_dtype(n.out.dtype)})"


@entry("scalar_tensor")
def scalar_tensor(n: Operation) -> str:
    return f"mx.array({n['s']}, mx.{mlx_dtype(n.out.dtype)})"


@entry("arange")
def arange(n: Operation) -> str:
    start, step = n.args.get("start", 0), n.args.get("step", 1)
    dtype = mlx_dtype(n.out.dtype)
    if dtype != "float32" and all(
        isinstance(value, int) or not isinstance(value, float) for value in (start, step, n.args["end"])
    ):
        bounds = n["end"] if start in (0, None) and step in (1, None) else f"{n.source(start or 0)}, {n['end']}"
        bounds += f", {n.source(step)}" if step not in (1, None) else ""
        return f"mx.arange({bounds}{'' if dtype == 'int32' else f', dtype=mx.{dtype}'})"
    return n.call("arange", n.source(start or 0), n["end"], n.source(step or 1), f"mx.{dtype}")


@entry("linspace", "logspace")
def linspace(n: Operation) -> str:
    if n.node.base == "logspace":
        return n.call("logspace", n["start"], n["end"], n["steps"], n["base"], f"mx.{mlx_dtype(n.out.dtype)}")
    return n.call("linspace", n["start"], n["end"], n["steps"], f"mx.{mlx_dtype(n.out.dtype)}")


@entry("eye")
def eye(n: Operation) -> str:
    columns = n.args.get("m")
    sizes = n["n"] if columns is None else f"{n['n']}, {n.source(columns)}"
    return f"mx.eye({sizes}{dtype_option(n).replace(', mx', ', dtype=mx')})"


@entry("vander", "linalg_vander")
def vander(n: Operation) -> str:
    return n.call(
        "vander", n["x"], n.source(n.args.get("N")), repr(bool(n.get("increasing", n.node.base != "vander")))
    )
