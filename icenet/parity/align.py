"""Alignment: which axes of an MLX array correspond to which axes of the PyTorch array.

Traces hold arrays with the axes of their framework. PyTorch's layers for signals, images and volumes take channels
first, `[B, C, *space]`, MLX's take channels last, `[B, *space, C]`. Before two arrays are compared, MLX's is aligned
with PyTorch's. There are two alignments:

    SAME    the axes are the same
    MOVED   PyTorch's axis 1, the channels, is MLX's last axis

`compare` of any two modules has a third one for calls within the model (`rows`): the elements are in the same order,
but leading axes are merged, or of length 1, on one side. An example is a layer that gets `[B, L, D]` in MLX and
`[B * L, D]` in PyTorch, or the state of a recurrent layer, `[B, H]` in MLX and `[1, B, H]` in PyTorch. A norm of the
last axis may get `[B, L, H, E]` on one side and `[B, H, L, E]` on the other (`exchanged`). In a model with layers of
PyTorch whose `batch_first` is False, an array may be `[B, L, D]` on one side and `[L, B, D]` on the other
(`sequence_first`). And an argument may have the same values for each row of a batch on one side, and a single row of
them on the other, as positions `[B, L, D]` and `[1, L, D]` (`copies`).

If both sides call a layer of the same kind, the kind determines the alignment (`KINDS`), as it determines the layout
of weights. A module whose kind does not determine it (an activation, a container, a user's own module) may take
either. Then the shapes of the two recorded arrays determine it, and where both alignments fit, as for 8 channels of
length 8, the one that is much nearer in value. If neither is, because an earlier layer is wrong, it is the alignment
of other arrays of that shape in the run. No other permutation is ever applied: an array with height and width
exchanged is a difference. `permutation` and `flattened_input` name such differences in the report.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import rng

Array = npt.NDArray[Any]

SAME, MOVED = "same", "moved"
_ROWS, _COPIES = "rows ", "copies "
_EXCHANGED = "axes 1 and 2 exchanged"
SEQUENCE_FIRST = "axes 0 and 1 exchanged"
_AXES = {_EXCHANGED: (1, 2), SEQUENCE_FIRST: (0, 1)}

KINDS: dict[str, str] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), MOVED),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), MOVED),
    **dict.fromkeys(("batch_norm", "group_norm", "instance_norm", "pool", "upsample"), MOVED),
    **dict.fromkeys(("linear", "embedding", "layer_norm", "rms_norm"), SAME),
    **dict.fromkeys(("recurrent", "attention", "native_recurrent"), SAME),
}
"""Layer kind -> alignment of its inputs and outputs. Missing kinds (`plain`, `prelu`) do not determine it."""

DIFFERENT_CALLS = frozenset({"attention", "native_recurrent"})
"""Kinds whose first output is the same on both sides, but not the further outputs and the names of parameters."""

_SAMPLES = 2000  # elements that `permutation` compares
_MASKED = 1e3
"""A negative value this many times as large as the others (and as one) masks: softmax gives it nothing."""
EQUAL = 1e-3  # arrays at a smaller relative distance are equal but for rounding errors, also in half precision


# ---- single arrays ------------------------------------------------------------------------------------------


Shapes = Mapping[tuple[int, ...], str]
"""The alignment of arrays by their shape in PyTorch, where it is known."""


def alignment(kind: str | None, ours: Array, theirs: Array, shapes: Shapes) -> str | None:
    """Returns SAME or MOVED for an array of MLX and one of PyTorch, None if the shapes do not fit.

    Args:
        kind: Kind of the layer that both sides call; None if it does not determine the alignment.
        ours, theirs: The array in MLX and in PyTorch.
        shapes: Alignments of other arrays of the run, by shape.
    """
    determined = KINDS.get(kind or "")
    if ours.ndim < 3 or determined == SAME:
        return SAME if ours.shape == theirs.shape else None
    candidates = [determined] if determined else [MOVED, SAME]
    fitting = [name for name in candidates if to_torch(name, ours, copy=False).shape == theirs.shape]
    if len(fitting) < 2:
        return fitting[0] if fitting else None
    return nearer(ours, theirs) or shapes.get(theirs.shape) or _default(ours.ndim)


def nearer(ours: Array, theirs: Array) -> str | None:
    """Returns the alignment that is much nearer in value; None if neither is."""
    moved, same = distance(to_torch(MOVED, ours, copy=False), theirs), distance(ours, theirs)
    return MOVED if moved < same / 2 else SAME if same < moved / 2 else None


def rows(ours: Array, theirs: Array) -> str | None:
    """Returns the alignment of arrays whose elements are in the same order, in other leading axes; None if not.

    Either the last axes are equal and the others are merged on one side, or one side has axes of length 1.
    """
    if ours.shape == theirs.shape or ours.size != theirs.size or not ours.size:
        return None
    long = [tuple(size for size in array.shape if size > 1) for array in (ours, theirs)]
    is_merged = ours.ndim != theirs.ndim and min(ours.ndim, theirs.ndim) > 0 and ours.shape[-1] == theirs.shape[-1]
    if not is_merged and long[0] != long[1]:
        return None
    return f"{_ROWS}{list(ours.shape)} {list(theirs.shape)}"


def exchanged(ours: Array, theirs: Array) -> str | None:
    """Returns the alignment of [B, L, H, E] and [B, H, L, E], if the shapes fit, and of equal shapes the values."""
    if ours.ndim != 4 or theirs.ndim != 4 or ours.swapaxes(1, 2).shape != theirs.shape:
        return None
    if ours.shape == theirs.shape and (is_near(ours, theirs) or not is_near(ours.swapaxes(1, 2), theirs)):
        return None
    return _EXCHANGED


def sequence_first(ours: Array, theirs: Array) -> str | None:
    """Returns the alignment of [B, L, ...] and [L, B, ...], if the shapes fit, and of equal shapes the values."""
    if ours.ndim < (3 if ours.dtype.kind == "f" else 2) or ours.swapaxes(0, 1).shape != theirs.shape:
        return None
    if ours.shape == theirs.shape and (is_near(ours, theirs) or not is_near(ours.swapaxes(0, 1), theirs)):
        return None
    return SEQUENCE_FIRST


def copies(ours: Array, theirs: Array) -> str | None:
    """Returns the alignment of arrays of which one has equal parts along axes that the other lacks, or has once."""
    if ours.size == theirs.size or not min(ours.size, theirs.size) or ours.dtype.kind != "f":
        return None
    few, many = sorted((ours, theirs), key=lambda array: array.size)
    axes = _copied_axes(few.shape, many.shape)
    if not axes or not np.array_equal(many, np.broadcast_to(_first(many, axes), many.shape)):
        return None
    return f"{_COPIES}{list(ours.shape)} {list(theirs.shape)}"


def has_copies(name: str) -> bool:
    """Returns whether an alignment is one of `copies`."""
    return name.startswith(_COPIES)


def is_single_in_mlx(name: str) -> bool:
    """Returns whether an array of PyTorch has copies of the single part that the MLX array has."""
    return has_copies(name) and math.prod(_shape_of(name, 0)) < math.prod(_shape_of(name, 1))


def cotangent_to_mlx(name: str, array: Array) -> Array:
    """Returns a cotangent of a PyTorch array as one of the MLX array: of copies their sum, or the first one alone."""
    if not has_copies(name):
        return to_mlx(name, array)
    ours, theirs = (_shape_of(name, index) for index in (0, 1))
    if is_single_in_mlx(name):
        return np.asarray(array.sum(axis=_copied_axes(ours, theirs))).reshape(ours)
    found = np.zeros(ours, array.dtype)
    _first(found, _copied_axes(theirs, ours))[...] = array
    return found


def gradient_to_torch(name: str, array: Array) -> Array:
    """Returns a gradient by an MLX array as that by the PyTorch array, of copies their sum.

    If the array of PyTorch has copies (`is_single_in_mlx`), the result is the sum of their gradients.
    """
    if not has_copies(name):
        return to_torch(name, array)
    ours, theirs = (_shape_of(name, index) for index in (0, 1))
    return array if is_single_in_mlx(name) else array.sum(axis=_copied_axes(theirs, ours)).reshape(theirs)


def _copied_axes(few: tuple[int, ...], many: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the axes of an array along which it has copies of the single part of another; none if it cannot."""
    missing = len(many) - len(few)
    if missing < 0:
        return ()
    sizes = (1,) * missing + few
    axes = tuple(axis for axis, size in enumerate(many) if axis < missing or sizes[axis] != size)
    return axes if all(sizes[axis] == 1 for axis in axes) else ()


def _first(array: Array, axes: tuple[int, ...]) -> Array:
    """Returns a view of the first part along some axes, which stay with length 1."""
    return array[tuple(slice(1) if axis in axes else slice(None) for axis in range(array.ndim))]


def _shape_of(name: str, index: int) -> tuple[int, ...]:
    """Returns a shape of an alignment of `rows` or `copies`: 0 of MLX, 1 of PyTorch."""
    text = name[name.index("[") + 1 : -1].split("] [")[index]
    return tuple(int(size) for size in text.split(",") if size)


def is_near(ours: Array, theirs: Array) -> bool:
    """Returns whether aligned arrays are equal but for rounding errors, also in half precision."""
    return ours.shape == theirs.shape and distance(ours, theirs) < 10 * EQUAL


def to_torch(name: str, array: Array, copy: bool = True) -> Array:
    """Returns an MLX array with PyTorch's axes: in their order in memory, or without `copy` as a view."""
    return _with_axes(name, array, (-1, 1), 1, copy)


def to_mlx(name: str, array: Array, copy: bool = True) -> Array:
    """Returns a PyTorch array with MLX's axes: in their order in memory, or without `copy` as a view."""
    return _with_axes(name, array, (1, -1), 0, copy)


def _with_axes(name: str, array: Array, moved: tuple[int, int], index: int, copy: bool) -> Array:
    if name.startswith(_ROWS):
        shape = _shape_of(name, index)
        if array.size != math.prod(shape):
            raise ReplayError(f"computes an array of shape {list(array.shape)} in place of {list(shape)}")
        return array.reshape(shape)
    if has_copies(name):
        shape = _shape_of(name, index)
        axes = _copied_axes(shape, array.shape)
        return _first(array, axes).reshape(shape) if axes else np.broadcast_to(array, shape)
    if name not in _AXES and (name != MOVED or array.ndim < 3):
        return array
    view = array.swapaxes(*_AXES[name]) if name in _AXES else np.moveaxis(array, *moved)
    return np.ascontiguousarray(view) if copy else view


def masked(array: Array) -> npt.NDArray[np.bool_] | None:
    """Returns where an array holds masked values: -inf, or negative and far larger than the rest; None if nowhere."""
    if array.dtype.kind != "f" or not array.size or float(np.fmin.reduce(array, axis=None)) > -_MASKED:
        return None
    rest = array[np.isfinite(array) & (array > -_MASKED)].astype(np.float64)
    scale = math.sqrt(float(np.square(rest).mean())) if rest.size else 0.0
    found: npt.NDArray[np.bool_] = array <= -_MASKED * max(scale, 1.0)
    return found if found.any() else None


def masks_otherwise(ours: Array, theirs: Array) -> bool:
    """Returns whether two aligned arrays mask the same elements by other numbers, such as -inf and -1e9."""
    if ours.shape != theirs.shape:
        return False
    own = masked(ours)
    other = masked(theirs) if own is not None else None
    if own is None or other is None or not (own & other).any():
        return False
    x, y = (array[own & other].astype(np.float64) for array in (ours, theirs))
    finite = np.isfinite(x) & np.isfinite(y)
    if not np.array_equal(np.isfinite(x), np.isfinite(y)):
        return True
    return bool((np.abs(x[finite] - y[finite]) > EQUAL * np.abs(y[finite])).any())


def is_mask(array: Array) -> bool:
    """Returns whether an array looks like a mask: all its values are the largest one or are masked by it."""
    if array.dtype.kind in "bui":
        return True
    hidden = masked(array)
    shown = array[~hidden] if hidden is not None else array
    return hidden is not None and (not shown.size or bool((shown == shown[0]).all()))


def remark(kind: str | None, name: str, ndim: int) -> str:
    """Returns a remark on an alignment that neither the kind nor the number of axes lets expect; else empty."""
    if kind in KINDS or name == _default(ndim):
        return ""
    return "channels last in MLX, first in PyTorch" if name == MOVED else "the same axes in MLX and PyTorch"


def unequal_shapes(kind: str | None, ours: Array, theirs: Array) -> str:
    """Returns a phrase on two arrays that have no alignment, with the remedy if there is one."""
    text = f"shape {list(ours.shape)} in MLX, {list(theirs.shape)} in PyTorch"
    if ours.ndim > 2 and ours.shape == theirs.shape and KINDS.get(kind or "") == MOVED:
        return f"{text}: in MLX, {kind} takes channels last, mx.moveaxis(x, 1, -1)"
    found = permutation(ours, theirs)
    return f"{text}: {found}" if found else text


def permutation(ours: Array, theirs: Array) -> str:
    """Returns which transposition turns an aligned MLX array into the PyTorch array; empty if none does."""
    if ours.ndim != theirs.ndim or not 2 <= ours.ndim <= 5 or ours.size != theirs.size or ours.size < 2:
        return ""
    sizes = [float(np.square(array, dtype=np.float64).sum()) for array in (ours, theirs)]
    if not math.isfinite(sum(sizes)) or abs(sizes[0] - sizes[1]) > EQUAL * max(sizes):
        return ""  # other elements, whatever their order
    chosen = (rng.uniform(rng.key(0, "permutation"), (min(_SAMPLES, theirs.size),)) * theirs.size).astype(np.int64)
    index = np.unravel_index(chosen, theirs.shape)
    for axes in itertools.permutations(range(ours.ndim)):
        permuted = ours.transpose(axes)
        long = [axis for axis in axes if ours.shape[axis] > 1]  # moving an axis of length 1 alone reorders nothing
        if (
            not (permuted.shape == ours.shape and long == sorted(long))
            and permuted.shape == theirs.shape
            and distance(permuted[index], theirs[index]) < EQUAL
        ):
            return f"equal to PyTorch's after x.transpose{axes}"
    return ""


def _default(ndim: int) -> str:
    return MOVED if ndim > 3 else SAME


def distance(a: Array, b: Array) -> float:
    """Returns the RMS of a - b relative to that of b; infinity if it is not finite."""
    with np.errstate(all="ignore"):
        difference = float(np.square(a.astype(np.float64) - b).sum())
        size = float(np.square(b.astype(np.float64)).sum())
    distance = math.sqrt(difference / size if size else difference)
    return distance if math.isfinite(distance) else math.inf


class ReplayError(Exception):
    """MLX fails on the inputs of PyTorch, or its outputs have no alignment; the message says why."""
