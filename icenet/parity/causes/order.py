"""Causes in the order of values: axes, halves, a direction or a shift."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.parity import align
from icenet.parity.causes.trial import Trial
from icenet.parity.trace import Value

Array = npt.NDArray[Any]

_MOST_PLACES, _MOST_VALUES = 512, 1 << 20
"""Number of elements along an axis, and of all values, up to which another order is searched for."""
_MOST_LISTED = 8
"""Number of elements of another order that are listed."""


def find_order(trial: Trial) -> str:
    """Returns how the elements of the array are ordered otherwise, if that explains the difference."""
    ours, exact = (np.asarray(values[trial.name].array) for values in (trial.ours, trial.exact))
    if ours.ndim < 1 or ours.shape != exact.shape or ours.size < 2:
        return ""
    if found := align.permutation(ours, exact):
        return f"swapped axes: {found.replace('PyTorch', 'b')}"
    for axis in (*range(1, ours.ndim), 0):
        size = ours.shape[axis]
        if size > 1 and trial.explains_array(np.flip(exact, axis)):
            return f"the order along axis {axis} is reversed in a"
        for shift in (1, -1):
            if size > 2 and _is_shifted(trial, ours, exact, axis, shift):
                return f"shifted by one along axis {axis} in a"
        for parts in (2, 3, 4):
            if size % parts == 0 and size > parts:
                blocks = np.split(exact, parts, axis)
                for order in itertools.permutations(range(parts)):
                    reordered = np.concatenate([blocks[i] for i in order], axis)
                    if order != tuple(range(parts)) and trial.explains_array(reordered):
                        return f"the {parts} parts along axis {axis} are in another order in a: {list(order)}"
    for axis in range(1, ours.ndim - 1):
        turned = list(exact.shape)
        turned[axis], turned[axis + 1] = turned[axis + 1], turned[axis]
        if 1 not in turned[axis : axis + 2]:
            for array in (exact.reshape(turned).swapaxes(axis, axis + 1), exact.swapaxes(axis, axis + 1)):
                if trial.explains_array(array.reshape(exact.shape)):
                    return f"swapped axes: axes {axis} and {axis + 1} are reshaped in a, not transposed"
    if ours.ndim == 3:
        batch, length, width = ours.shape
        for heads in range(2, width):
            if width % heads == 0:
                split = exact.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)
                if trial.explains_array(split.reshape(exact.shape)):
                    return "swapped axes: heads and positions are not exchanged before the heads are merged in a"
                back = exact.reshape(batch, heads, length, width // heads).transpose(0, 2, 1, 3)
                if trial.explains_array(back.reshape(exact.shape)):
                    return "swapped axes: heads and positions are exchanged once more in a"
    if ours.ndim == 2:
        for value in trial.given.values:
            shape = value.array.shape
            if len(shape) < 3 or shape[0] != len(ours) or math.prod(shape) != ours.size:
                continue
            if trial.explains_array(align.to_mlx(align.MOVED, exact.reshape(shape)).reshape(exact.shape)):
                return "flattened channels last: write mx.moveaxis(x, -1, 1).flatten(1) in MLX"
    return ""


def find_chosen(trial: Trial) -> str:
    """Returns which elements along an axis `a` has at each place, if they are those of `b` in another order."""
    ours, exact = (np.asarray(values[trial.name].array, np.float64) for values in (trial.ours, trial.exact))
    if not trial.is_forward or ours.shape != exact.shape or not np.isfinite(ours).all():
        return ""
    for axis in range(1, ours.ndim):
        size = ours.shape[axis]
        if not 2 < size <= _MOST_PLACES or exact.size > _MOST_VALUES or not np.isfinite(exact).all():
            continue
        rows, others = (np.moveaxis(array, axis, 0).reshape(size, -1) for array in (ours, exact))
        distances = np.square(rows).sum(1)[:, None] + np.square(others).sum(1) - 2 * rows @ others.T
        chosen = distances.argmin(1)
        is_same = np.array_equal(chosen, np.arange(size))
        if not is_same and len(set(chosen)) > 1 and trial.explains_array(np.take(exact, chosen, axis)):
            first = int(np.flatnonzero(chosen != np.arange(size))[0])
            listed = ", ".join(map(str, chosen[first : first + _MOST_LISTED]))
            more = ", ..." if first + _MOST_LISTED < size else ""
            return f"along axis {axis}, a has other elements of b from position {first} on: [{listed}{more}]"
    return ""


def find_direction(trial: Trial) -> str:
    """Returns whether a layer runs over its input in the other direction, if that explains the difference."""
    exact = np.asarray(trial.exact[trial.name].array)
    if not trial.pair.is_leaf or exact.ndim < 3 or not trial.is_forward:
        return ""
    for axis in (1, 0):
        values = [
            Value(np.ascontiguousarray(np.flip(v.array, axis)), v.dtype)
            if v.is_float and v.array.shape[:2] == exact.shape[:2]
            else v
            for v in trial.given.values
        ]
        new = trial.replay(values=values).get(trial.name)
        if new is not None and trial.explains_array(np.flip(np.asarray(new.array, np.float64), axis)):
            return f"the sequence is reversed in a: the layer runs over axis {axis} in the other direction"
    return ""


def _is_shifted(trial: Trial, ours: Array, exact: Array, axis: int, shift: int) -> bool:
    inner = [slice(None)] * ours.ndim
    shifted = np.roll(exact, shift, axis)
    inner[axis] = slice(1, None) if shift > 0 else slice(0, -1)
    new = ours.astype(np.float64).copy()
    new[tuple(inner)] = shifted[tuple(inner)]
    return bool(np.ptp(exact[tuple(inner)], axis=axis).max() > 0) and trial.explains_array(new)
