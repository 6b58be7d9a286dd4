"""The smallest inputs on which two modules differ, and their file."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core.files import write_bytes
from icenet.parity.inputs import Inputs
from icenet.parity.trace import Value

Array = npt.NDArray[Any]


def shrink(inputs: Inputs, differs: Callable[[Inputs], bool], most: int = 60) -> Inputs:
    """Returns the smallest inputs for which a function is true, by halving axes and setting values to zero.

    Args:
        inputs: Inputs for which it is true.
        differs: Whether the sides differ on inputs; false if one of them fails.
        most: The largest number of calls.
    """
    left = most
    current = inputs

    def attempt(candidate: Inputs | None) -> bool:
        nonlocal left, current
        if candidate is None or left <= 0:
            return False
        left -= 1
        if not differs(candidate):
            return False
        current = candidate
        return True

    changed = True
    while changed and left > 0:
        changed = False
        for axis in range(max(value.array.ndim for value in current.values)):
            size = max((v.array.shape[axis] for v in current.values if v.array.ndim > axis), default=1)
            for length in dict.fromkeys((1, size // 4, size // 2, size - size // 4, size - 1)):
                if 0 < length < size and attempt(_shortened(current, axis, size, length)):
                    changed = True
                    break
    for index, value in enumerate(current.values):
        if not value.is_float:
            attempt(_replaced(current, index, np.zeros_like(value.array)))
            continue
        for array in (np.ones_like(value.array), np.round(value.array), np.sign(value.array)):
            if attempt(_replaced(current, index, array)):
                break
    return current


def _shortened(inputs: Inputs, axis: int, size: int, length: int) -> Inputs | None:
    """Returns inputs with fewer elements along an axis, in all arrays that have as many there."""
    values = []
    for value in inputs.values:
        if value.array.ndim > axis and value.array.shape[axis] == size:
            values.append(Value(np.ascontiguousarray(np.take(value.array, range(length), axis)), value.dtype))
        else:
            values.append(value)
    return Inputs(inputs.given, values)


def _replaced(inputs: Inputs, index: int, array: Array) -> Inputs:
    """Returns inputs with another array, in the dtype of the one that it replaces."""
    values = list(inputs.values)
    values[index] = Value(array.astype(values[index].array.dtype), values[index].dtype)
    return Inputs(inputs.given, values)


def save(inputs: Inputs, path: str | os.PathLike[str]) -> Path:
    """Writes the arrays of inputs to an .npz file: keyword arguments by name, positional ones as arr_0, arr_1, ...

    `icenet parity A B --input FILE` reads it.

    Raises:
        FileError: The file cannot be written.
    """
    file = Path(path)
    file = file if file.suffix == ".npz" else file.with_name(f"{file.name}.npz")
    arrays = [value.array for value in inputs.values]
    buffer = io.BytesIO()
    if inputs.given[1]:
        named: dict[str, Any] = dict(zip(inputs.names, arrays, strict=True))
        np.savez(buffer, **named)
    else:
        np.savez(buffer, *arrays)
    write_bytes(file, buffer.getvalue())
    return file
