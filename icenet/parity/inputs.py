"""Inputs of a comparison: those of the user, random ones, their axes on each side, and the smallest that differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from icenet.core.errors import UsageError
from icenet.core.weights.arrays import to_array
from icenet.parity import align
from icenet.parity.events import Slot, argument_names, map_leaves, rebuild
from icenet.parity.trace import Value, short_dtype
from icenet.parity.yardstick import round_to

Array = npt.NDArray[Any]

LAYOUTS = {"same": align.SAME, "channels_last": align.MOVED}


@dataclass(frozen=True)
class Inputs:
    """The arguments of a module.

    Attributes:
        given: `(args, kwargs)` with a `Slot` in place of each array.
        values: The arrays, with the axes of `a`.
    """

    given: Any
    values: list[Value]

    @property
    def names(self) -> list[str]:
        """The names of the arrays: position or keyword."""
        return argument_names(self.given)

    def describe(self) -> dict[str, str]:
        """Returns dtype and shape of each array by name."""
        return {name: f"{v.dtype} {list(v.array.shape)}" for name, v in zip(self.names, self.values, strict=True)}

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments with numpy arrays."""
        args, kwargs = rebuild(self.given, [value.array for value in self.values])
        return tuple(args), kwargs


def read(inputs: Any, dtype: str = "fp32") -> Inputs:
    """Returns the inputs that a user gave: an array, a tuple or list of arguments, or a dict of keyword arguments.

    Args:
        inputs: Arrays of numpy, MLX or PyTorch, also nested; other arguments are given to both sides as they are.
        dtype: Dtype to which floats are rounded.

    Raises:
        UsageError: There is no array, or one has no values.
    """
    if isinstance(inputs, dict):
        args, kwargs = (), dict(inputs)
    elif isinstance(inputs, (tuple, list)):
        args, kwargs = tuple(inputs), {}
    else:
        args, kwargs = (inputs,), {}
    values: list[Value] = []

    def take(leaf: Any) -> Any:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            return leaf
        array = to_array(f"input {len(values)}", leaf)
        if array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16:
            values.append(Value(round_to(np.asarray(array, np.float64), dtype), dtype))
        else:
            values.append(Value(array, short_dtype(array.dtype)))
        return Slot(len(values) - 1)

    given = map_leaves((args, kwargs), take)
    if not values:
        what = f"a {type(inputs).__name__}" if not isinstance(inputs, (tuple, list, dict)) else "no array"
        raise UsageError(
            f"compare: inputs is {what}: give an array, a tuple of arrays, or a dict of keyword arguments"
        )
    found = Inputs(given, values)
    for name, value in zip(found.names, values, strict=True):
        if value.array.size == 0:
            raise UsageError(f"compare: input {name} is an array without values; nothing would be compared")
    return found


# ---- axes ---------------------------------------------------------------------------------------------------


def for_reference(inputs: Inputs, b: Any, layout: Any, same: bool) -> list[Value]:
    """Returns the inputs with the axes of `b`.

    Args:
        inputs: With the axes of `a`.
        b: The side of the reference.
        layout: See `icenet.parity.compare`.
        same: Whether both sides are of one framework.
    """
    by_name = layout if isinstance(layout, Mapping) else {}
    for name in by_name:
        if str(name) not in inputs.names:
            raise UsageError(f"compare: layout: there is no input {name!r}; the inputs are {', '.join(inputs.names)}")
    for name in by_name.values() if by_name else [layout]:
        if name is not None and name not in LAYOUTS:
            raise UsageError(f"compare: layout is {name!r}: give {' or '.join(LAYOUTS)}")
    by_name = {str(name): how for name, how in by_name.items()}
    found = []
    for name, value in zip(inputs.names, inputs.values, strict=True):
        chosen = by_name.get(name) if by_name else layout
        how = LAYOUTS[chosen] if chosen is not None else align.SAME if same else _axes(value, b)
        found.append(Value(align.to_torch(how, value.array), value.dtype))
    return found


def moved(inputs: Inputs, how: str) -> list[Value]:
    """Returns the inputs with the last axis of floats at PyTorch's place for channels, or unchanged."""
    return [Value(align.to_torch(how, v.array) if v.is_float else v.array, v.dtype) for v in inputs.values]


def _axes(value: Value, b: Any) -> str:
    """Returns the alignment of an input, by the first layer of `b` that defines one."""
    if not value.is_float or value.array.ndim < 3:
        return align.SAME
    for path in b.modules:
        kind = b.kinds.get(path)
        if kind is None:
            continue
        if kind.startswith("conv"):
            return align.MOVED if int(kind[-2]) + 2 == value.array.ndim else align.SAME
        if value.array.ndim == 4 or kind != "pool":
            return align.KINDS.get(kind, align.SAME)
    return align.SAME
