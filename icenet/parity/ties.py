"""Moves the inputs of a layer to a nearby point at which the layer is differentiable.

Max pooling at equal maxima, a leaky ReLU at 0 and clipping at its edge have no derivative. Frameworks return
different subgradients there, all of them valid: MLX divides the gradient among equal maxima, PyTorch gives it to the
first. Equal values are common: zeros behind a ReLU, the margins of images, any values in bf16.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import rng

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

_STEPS = {"bf16": 64, "fp16": 512, "fp32": 2048, "fp64": 2048}
"""Candidates between two powers of two. Their last bit of 7, 10 or 12 is set, so that none is 0, 1, 6 or 0.5."""

_SMALLEST = -9
"""The exponent of the smallest candidate, relative to that of the RMS."""


def may_be_kinks(array: Array) -> bool:
    """Returns whether values are equal to one another, or are multiples of 1/2, the usual edges of a function."""
    return bool((2 * array == np.rint(2 * array)).any()) or np.unique(array).size < array.size


def moved_apart(array: Array, dtype: str, key: npt.NDArray[np.uint32]) -> Floats:
    """Returns nearby values that differ from one another and are no edge of a usual function.

    The order of unequal values and the range are kept, so that probabilities stay probabilities. Values that are not
    finite (masks) stay. If `dtype` has too few numbers for all values, those of each sample differ, or else those of
    each image, or else those of each window of an image.

    Args:
        array: Floats with PyTorch's axes.
        dtype: fp32, bf16 or fp16, in which the result is exact.
        key: Key of the random order of equal values.
    """
    values = np.asarray(array, np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return values
    grid = _Grid(values[finite], _STEPS[dtype])
    inner = min(max(values.ndim - 2, 2), values.ndim)  # the axes that a window may have
    order = rng.uniform(key, values.shape)
    for axis in range(values.ndim - inner + 1):
        rows = (math.prod(values.shape[:axis]), -1)
        if values.size // rows[0] <= grid.size:
            parts = zip(values.reshape(rows), order.reshape(rows), strict=True)
            indices = np.stack([grid.distinct(*part) for part in parts]).reshape(values.shape)
            break
    else:
        indices = grid.pattern(values.shape, inner, key)
    moved: Floats = np.where(finite, grid.values(indices), values)
    return moved


class _Grid:
    """The candidates from the smallest to the largest value, by index: positive ones from 0, negative ones to -1."""

    def __init__(self, values: Floats, steps: int) -> None:
        low, high = values.min(), values.max()
        size = min(1.0, float(np.sqrt(np.mean(np.square(values))))) or 1.0  # a mask of -1e9 is not the scale
        self.steps, self.least = steps, 2.0 ** (math.frexp(size)[1] - 1 + _SMALLEST)
        first, last = (int(index) for index in self.indices(np.array([low, high])))
        # a candidate is half a step farther from 0 than the values that have its index
        self.first = first + (low < 0)
        self.last = last - (high > 0 or low < high == 0)
        if self.last - self.first < steps:  # nearly equal values are spread towards 0, zeros away from it
            if high > 0:
                self.first = min(self.first, max(self.last - 4 * steps, 0 if low >= 0 else -self.last))
                self.last = max(self.last, self.first + steps)
            elif low < 0:
                self.last = max(self.last, min(self.first + 4 * steps, -1))
                self.first = min(self.first, self.last - steps)
            else:
                self.last = self.first + 4 * steps

    @property
    def size(self) -> int:
        return self.last - self.first + 1

    def indices(self, values: Floats) -> npt.NDArray[np.int64]:
        """Returns the index of the candidate at each value."""
        mantissa, exponent = np.frexp(np.maximum(np.abs(values) / self.least, 1.0))
        index = (exponent - 1) * self.steps + ((2 * mantissa - 1) * self.steps).astype(np.int64)
        return np.where(values < 0, -1 - index, index)

    def values(self, indices: npt.NDArray[np.int64]) -> Floats:
        """Returns the candidates with the given indices."""
        octave, step = np.divmod(np.where(indices < 0, -1 - indices, indices), self.steps)
        sizes: Floats = self.least * np.ldexp(1 + (step + 0.5) / self.steps, octave)
        return np.where(indices < 0, -sizes, sizes)

    def distinct(self, values: Floats, order: Array) -> npt.NDArray[np.int64]:
        """Returns the nearest distinct indices in the order of the values, and of `order` where they are equal."""
        ranks = np.lexsort((order, values))
        steps = np.arange(values.size)
        index = self.indices(np.nan_to_num(values[ranks], nan=0.0, posinf=0.0, neginf=0.0))
        index = np.maximum.accumulate(np.maximum(index, self.first) - steps) + steps
        found = np.empty(values.size, np.int64)
        found[ranks] = np.minimum(index, self.last - values.size + 1 + steps)
        return found

    def pattern(self, shape: tuple[int, ...], inner: int, key: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
        """Returns indices that differ within each window of the last `inner` axes, whatever the values are."""
        side = int(self.size ** (1 / inner))
        position = np.zeros(shape[-inner:], np.int64)
        for coordinates in np.indices(shape[-inner:]):
            position = position * side + coordinates % side
        return np.broadcast_to(self.first + rng.permutation(key, side**inner)[position], shape)
