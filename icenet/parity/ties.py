"""Gradients at ties and edges, where a layer has none: max pooling at equal maxima, a leaky ReLU at 0.

Frameworks return different subgradients there, all of them valid: MLX divides the gradient among equal maxima,
PyTorch gives it to the first. Equal values are common: zeros behind a ReLU, the margins of images, any values in
bf16. So a gradient is compared at a nearby point at which the layer is differentiable (`moved_apart`).

That does not show a gradient which is wrong at the ties only, such as one that each of two equal maxima gets in full.
But the sum of the gradients of all elements with the same value does not depend on the choice: if all of them move
together, they stay equal, and the layer is differentiable along that move. At an edge, such as the 0 of a leaky
ReLU, it has two one-sided derivatives, and with positive cotangents the sum lies between them. `Ties` measures both
with the reference, whose rounding errors are far smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def tie_remark(class_name: str, is_leaf: bool) -> str:
    """Returns what to say of a layer whose gradients agree except at ties.

    Args:
        class_name: Its class in MLX, such as `mlx.nn.layers.pooling.MaxPool2d`.
        is_leaf: Whether no other layer is within it.
    """
    if not class_name.startswith("mlx.nn.layers.pooling.Max"):
        remark = "its gradient differs only at ties or edges of its inputs, where it has no derivative"
        return remark if is_leaf else f"{remark}; there it is not judged, because other layers are within it"
    remark = "its gradient differs only at ties: MLX divides it among equal maxima, PyTorch gives it to the first"
    return f"{remark}, as max_pool of icenet.nn does" if class_name.endswith("MaxPool2d") else remark


_STEP = 2.0**-36
"""The relative distance of the points at which `Ties` asks the reference, which is far below an ulp of fp32."""

_JITTERS, _SHIFTS = 8, 4
_JUMP = 1e-6
"""A gradient that changes by more than this share of its RMS over such a distance has a jump."""

_EQUAL = 1e-9
"""Sums that differ by less than this share of the largest one are equal but for the curvature of the layer."""


class Ties:
    """The ties and edges at the inputs of a layer.

    Args:
        inputs: The float inputs.
        gradients: Returns the reference's gradients of such inputs, with cotangents that are not negative.
    """

    def __init__(self, inputs: Sequence[Array], gradients: Callable[[list[Floats]], list[Floats]]) -> None:
        # adding 0 turns -0 into 0, which is equal to it
        self._inputs = [np.asarray(array, np.float64) + 0.0 for array in inputs]
        values = np.concatenate([np.zeros(0), *(array.reshape(-1) for array in self._inputs)])
        finite = values[np.isfinite(values)]
        self._size = min(1.0, float(np.sqrt(np.mean(np.square(finite))))) or 1.0 if finite.size else 1.0
        self._groups = np.unique(values, return_inverse=True)[1].reshape(-1)
        self._reference = gradients
        self._jitters = [gradients(self._moved(sample, together=False)) for sample in range(_JITTERS)]

    @property
    def are_kinks(self) -> bool:
        """Whether the gradient of the reference has a jump at the inputs: it depends on the order of equal values."""
        for found in zip(*self._jitters, strict=True):
            stacked = np.stack(found)
            size = float(np.sqrt(np.mean(np.square(stacked)))) if stacked.size else 0.0
            if stacked.size and float(np.ptp(stacked, axis=0).max()) > _JUMP * size:
                return True
        return False

    def sums(self, gradients: Sequence[Array]) -> Floats:
        """Returns the sum of the gradients of the elements with a value, for each value, float64 `[values]`."""
        weights = np.concatenate([np.zeros(0), *(np.asarray(array, np.float64).reshape(-1) for array in gradients)])
        return np.asarray(np.bincount(self._groups, weights), np.float64)

    def bounds(self) -> tuple[Floats, Floats]:
        """Returns the least and the largest valid sum for each value, float64 `[values]`.

        They are infinite where the ties are not among the inputs themselves but among values that are computed from
        them: then the sum depends on the order of equal inputs.
        """
        shifted = [self._reference(self._moved(sample, together=True)) for sample in range(_SHIFTS)]
        here = self._reference([array.copy() for array in self._inputs])
        sums = np.stack([self.sums(found) for found in (here, *shifted)])
        low, high = sums.min(axis=0), sums.max(axis=0)
        jittered = np.stack([self.sums(found) for found in self._jitters])
        margin = _EQUAL * float(np.abs(sums).max(initial=0.0))
        simple = (jittered >= low - margin).all(axis=0) & (jittered <= high + margin).all(axis=0)
        return np.where(simple, low, -np.inf), np.where(simple, high, np.inf)

    def _moved(self, sample: int, together: bool) -> list[Floats]:
        """Returns inputs that are moved a little: equal values by the same distance, or each by its own."""
        moved = []
        for number, array in enumerate(self._inputs):
            if together:  # by a function of the value; in the next sample, in the opposite direction
                key = rng.key(0, "shift", sample // 2)
                bits = array.astype(np.float32).view(np.uint32).reshape(-1)
                words, _ = rng.threefry2x32((key[:1], key[1:]), (bits, np.zeros(bits.size, np.uint32)))
                uniform = (words.reshape(array.shape) * 2.0**-31 - 1) * (1 if sample % 2 else -1)
            else:
                uniform = 2.0 * rng.uniform(rng.key(0, "jitter", sample, number), array.shape) - 1
            finite = np.isfinite(array)
            size = np.maximum(np.abs(np.where(finite, array, 0.0)), self._size)
            moved.append(np.where(finite, array + _STEP * uniform * size, array))
        return moved


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
