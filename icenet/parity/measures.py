"""Sizes, distances and roundings of arrays, computed in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


# dtype: (bits of the mantissa without the leading one, exponent of the smallest normal number)
_FORMATS = {"fp64": (52, -1022), "fp32": (23, -126), "bf16": (7, -126), "fp16": (10, -14)}

BLOCK = 1 << 15
"""Number of values that are compared at once: their arrays stay in the cache."""

_EXPONENT = np.int64(0x7FF0000000000000)
"""The bits of the exponent of a float64."""


def rms(values: npt.ArrayLike) -> float:
    """Returns the root mean square; 0 for an empty array."""
    flat = np.asarray(values).reshape(-1)
    return math.sqrt(sum(sum_of_products(x, x) for (x,) in blocks(flat)) / flat.size) if flat.size else 0.0


def rms_distance(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Returns the root mean square of the differences of two arrays of one shape."""
    a, b = np.asarray(x).reshape(-1), np.asarray(y).reshape(-1)
    total = 0.0
    for block in blocks(a, b):
        difference = block[0] - block[1]
        total += sum_of_products(difference, difference)
    return math.sqrt(total / a.size) if a.size else 0.0


def sum_of_products(x: Floats, y: Floats) -> float:
    """Returns the scalar product of two vectors of float64.

    It is not computed by a BLAS: that starts its threads, which takes far longer than the sum if cores are busy.
    """
    return float(np.einsum("i,i->", x, y))


def blocks(*flat: npt.NDArray[Any]) -> Iterator[tuple[Floats, ...]]:
    """Yields blocks of vectors of one length as float64, which fit in the cache of a core."""
    for start in range(0, flat[0].size, BLOCK):
        yield tuple(np.asarray(x[start : start + BLOCK], np.float64) for x in flat)


def half_ulp(values: npt.ArrayLike, dtype: str = "fp32") -> Floats:
    """Returns half the distance between neighbouring numbers of `dtype` (fp64, fp32, bf16, fp16) at each value."""
    mantissa, least = _FORMATS[dtype]
    array = np.asarray(np.abs(np.asarray(values, np.float64)))
    bits = array.reshape(-1).view(np.int64) & _EXPONENT  # those of the power of two below
    halves: Floats = np.maximum(bits.view(np.float64), 2.0**least) * 2.0 ** -(mantissa + 1)
    return halves.reshape(array.shape)


def squared_distance(sample: npt.ArrayLike, exact: npt.ArrayLike) -> Floats:
    """Returns the squared distances, element by element; 0 where one of the two is not finite."""
    with np.errstate(invalid="ignore"):
        squares = np.square(np.asarray(sample, np.float64) - np.asarray(exact, np.float64))
    found: Floats = np.nan_to_num(squares, nan=0.0, posinf=0.0)
    return found


def round_to(values: npt.ArrayLike, dtype: str) -> npt.NDArray[Any]:
    """Returns the values rounded to the nearest of `dtype`: float64, float32 or float16 arrays; bf16 as float32."""
    array = np.asarray(values)
    if dtype == "bf16":
        bits = array.astype(np.float32).view(np.uint32)
        even = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # ties to even
        return np.where(np.isfinite(array), even & np.uint32(0xFFFF0000), bits).astype(np.uint32).view(np.float32)
    return array.astype({"fp64": np.float64, "fp32": np.float32, "fp16": np.float16}[dtype], copy=False)


def peak(values: Floats) -> float:
    """Returns the largest absolute value; 0 for an empty array."""
    return max(float(values.max()), -float(values.min())) if values.size else 0.0


def is_binary(array: npt.NDArray[Any]) -> bool:
    """Returns whether all values are 0 or 1, and one is 1: a mask, of which code makes booleans, lengths or ids."""
    if not array.size or array.flat[0] not in (0, 1):
        return False
    ones = array == 1
    return bool(ones.any() and (ones | (array == 0)).all())
