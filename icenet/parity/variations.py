"""Other values of inputs that do not show what is computed of them: masks of ones, states of zeros, equal lengths.

Each input with one value only gets other values of its kind, such that code which is right for the given ones is
defined for them: the first element of a row stays visible, the first length stays the longest one, and whole numbers
are at most as large as given ones.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from icenet.parity.inputs import Inputs
from icenet.parity.measures import round_to
from icenet.parity.trace import Value

Array = npt.NDArray[np.generic]

HIDDEN = {"fp32": -1e9, "bf16": -1e9, "fp16": -1e4}
"""What is added to hidden scores, by dtype."""
_MASKS = re.compile(r"mask|padding|visible|valid")


@dataclass(frozen=True)
class Variation:
    """Inputs with other values.

    Attributes:
        inputs: All inputs, of which some have other values.
        names: The inputs that have, each with its value in those given, such as `mask, which is 1 everywhere`.
    """

    inputs: Inputs
    names: tuple[str, ...]


def variations(inputs: Inputs, rows: dict[int, int], seed: int) -> tuple[list[Variation], list[str]]:
    """Returns the inputs with other values in place of all that have one value only, and with each of these alone.

    Args:
        inputs: Those given.
        rows: Number of rows of the table that an input selects from, by the number of the input, where it is known.
        seed: Seed of the values.

    Returns:
        The variations, the first of which has all other values, and the inputs with one value that have no others.
    """
    found: dict[int, Value] = {}
    without = []
    for index, (name, value) in enumerate(zip(inputs.names, inputs.values, strict=True)):
        if not _has_one_value(value.array):
            continue
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        other = _other(name, value, rows.get(index, 0), generator)
        if other is None:
            without.append(_described(name, value))
        else:
            found[index] = replace(value, array=np.ascontiguousarray(other, value.array.dtype))
    sets = [list(found)] + ([[index] for index in found] if len(found) > 1 else [])
    return [_varied(inputs, {index: found[index] for index in chosen}) for chosen in sets if chosen], without


def _varied(inputs: Inputs, others: dict[int, Value]) -> Variation:
    values = [others.get(index, value) for index, value in enumerate(inputs.values)]
    names = tuple(_described(inputs.names[index], inputs.values[index]) for index in others)
    return Variation(Inputs(inputs.given, values), names)


def _described(name: str, value: Value) -> str:
    return f"{name}, which is {value.array.reshape(-1)[0]:g} everywhere"


def _has_one_value(array: Array) -> bool:
    return array.ndim > 0 and array.size > 1 and array.dtype.kind != "c" and bool((array == array.flat[0]).all())


def _other(name: str, value: Value, rows: int, generator: np.random.Generator) -> Array | None:
    """Returns other values of an input that has one value only; None if none are known to be valid."""
    array, first = value.array, float(value.array.flat[0])
    if not np.isfinite(first):
        return None
    if rows > 1 and not _MASKS.search(name):  # which may have the values of ids by chance
        return generator.integers(0, rows, array.shape)
    hidden = _hidden(array.shape, generator)
    if array.dtype.kind == "b":  # True is visible, or padding
        return hidden ^ bool(first)
    is_mask = bool(_MASKS.search(name)) or (first == 1 and array.ndim == 2)
    if value.is_float:
        if is_mask:
            return np.where(hidden, HIDDEN[value.dtype] if first == 0 else 0.0, first)
        drawn = generator.uniform(0.25, 1.75, array.shape) if first > 0 else generator.standard_normal(array.shape)
        return round_to(drawn * (first or 1.0), value.dtype)
    if first in (0, 1) and (is_mask or first == 0):
        return np.where(hidden, 1 - first, first)
    if first < 2 or len(array) < 2:
        return None
    # lengths, steps: a smaller one is valid wherever a larger one is; packed sequences are in order of their lengths
    smaller = np.sort(generator.integers(max(1, int(first) // 2), int(first), array.shape), axis=0)[::-1]
    smaller[0] = array[0]
    return smaller


def _hidden(shape: tuple[int, ...], generator: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Returns a mask of the ends of rows: at least one element of each row is not in it, and one of some row is."""
    length = shape[-1]
    real = generator.integers(1, length + 1, (*shape[:-1], 1))
    real.reshape(-1)[-1] = max(1, length - max(1, length // 3))
    return np.arange(length) >= real
