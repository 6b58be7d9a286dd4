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
(`sequence_first`).

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import rng
from icenet.parity.trace import Call, Trace, Value, output_name

Array = npt.NDArray[Any]

SAME, MOVED = "same", "moved"
_ROWS = "rows "
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

_PORTED_MODEL = "icenet.models.ported.PortedModel"
"""The class of a model whose module is a port."""

_SAMPLES = 2000  # elements that `permutation` compares
_MASKED = 1e3
"""A negative value this many times as large as the others (and as one) masks: softmax gives it nothing."""
_EQUAL = 1e-3  # arrays at a smaller relative distance are equal but for rounding errors, also in half precision


# ---- single arrays ------------------------------------------------------------------------------------------


Shapes = Mapping[tuple[int, ...], str]
"""The alignment of arrays by their shape in PyTorch, where it is known."""


def alignment(kind: str | None, ours: Array, theirs: Array, shapes: Shapes) -> str | None:
    """Returns SAME or MOVED for an array of MLX and one of PyTorch, None if the shapes do not fit.

    Args:
        kind: Kind of the layer that both sides call; None if it does not determine the alignment.
        ours, theirs: The array in MLX and in PyTorch.
        shapes: Alignments of other arrays of the run (see `known_shapes`).
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
    moved, same = _distance(to_torch(MOVED, ours, copy=False), theirs), _distance(ours, theirs)
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


def _shape_of(name: str, index: int) -> tuple[int, ...]:
    """Returns a shape of an alignment of `rows`: 0 of MLX, 1 of PyTorch."""
    text = name.removeprefix(_ROWS)[1:-1].split("] [")[index]
    return tuple(int(size) for size in text.split(",") if size)


def is_near(ours: Array, theirs: Array) -> bool:
    """Returns whether aligned arrays are equal but for rounding errors, also in half precision."""
    return ours.shape == theirs.shape and _distance(ours, theirs) < 10 * _EQUAL


def to_torch(name: str, array: Array, copy: bool = True) -> Array:
    """Returns an MLX array with PyTorch's axes: in their order in memory, or without `copy` as a view."""
    return _with_axes(name, array, (-1, 1), 1, copy)


def to_mlx(name: str, array: Array, copy: bool = True) -> Array:
    """Returns a PyTorch array with MLX's axes: in their order in memory, or without `copy` as a view."""
    return _with_axes(name, array, (1, -1), 0, copy)


def _with_axes(name: str, array: Array, moved: tuple[int, int], index: int, copy: bool) -> Array:
    if name.startswith(_ROWS):
        return array.reshape(_shape_of(name, index))
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
    return bool((np.abs(x[finite] - y[finite]) > _EQUAL * np.abs(y[finite])).any())


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
    if not math.isfinite(sum(sizes)) or abs(sizes[0] - sizes[1]) > _EQUAL * max(sizes):
        return ""  # other elements, whatever their order
    chosen = (rng.uniform(rng.key(0, "permutation"), (min(_SAMPLES, theirs.size),)) * theirs.size).astype(np.int64)
    index = np.unravel_index(chosen, theirs.shape)
    for axes in itertools.permutations(range(ours.ndim)):
        permuted = ours.transpose(axes)
        long = [axis for axis in axes if ours.shape[axis] > 1]  # moving an axis of length 1 alone reorders nothing
        if (
            not (permuted.shape == ours.shape and long == sorted(long))
            and permuted.shape == theirs.shape
            and _distance(permuted[index], theirs[index]) < _EQUAL
        ):
            return f"equal to PyTorch's after x.transpose{axes}"
    return ""


def _default(ndim: int) -> str:
    return MOVED if ndim > 3 else SAME


def _distance(a: Array, b: Array) -> float:
    """Returns the RMS of a - b relative to that of b; infinity if it is not finite."""
    with np.errstate(all="ignore"):
        difference = float(np.square(a.astype(np.float64) - b).sum())
        size = float(np.square(b.astype(np.float64)).sum())
    distance = math.sqrt(difference / size if size else difference)
    return distance if math.isfinite(distance) else math.inf


# ---- traces and calls ---------------------------------------------------------------------------------------


def known_shapes(mlx: Trace, torch: Trace) -> dict[tuple[int, ...], str]:
    """Returns the alignments that layer kinds or values determine, the first one by each shape in PyTorch."""
    found: dict[tuple[int, ...], str] = {}
    for name, value in mlx.values.items():
        if name.startswith("module:") and name in torch.values and value.array.ndim > 2:
            ours, theirs = value.array, torch.values[name].array
            known = KINDS.get(_common_kind(mlx, torch, name) or "")
            if known is None and ours.shape == theirs.shape == to_torch(MOVED, ours, copy=False).shape:
                known = nearer(ours, theirs)
            if known is not None:
                found.setdefault(theirs.shape, known)
    return found


def align_trace(mlx: Trace, torch: Trace) -> tuple[Trace, dict[str, str]]:
    """Returns a trace of MLX with PyTorch's axes, and remarks on its values by name.

    Args:
        mlx: A trace of any backend. One of PyTorch has PyTorch's axes already.
        torch: A trace of PyTorch, of the same run.
    """
    if mlx.backend == torch.backend:
        return mlx, {}
    values, remarks, shapes = dict(mlx.values), {}, known_shapes(mlx, torch)
    for name, value in mlx.values.items():
        theirs = torch.values.get(name)
        if theirs is None or not name.startswith("module:"):
            continue
        kind = _common_kind(mlx, torch, name)
        found = alignment(kind, value.array, theirs.array, shapes)
        if found is None:
            remarks[name] = unequal_shapes(kind, value.array, theirs.array)
        else:
            values[name] = Value(to_torch(found, value.array), value.dtype)
            remarks[name] = remark(kind, found, value.array.ndim)
    return replace(mlx, values=values), remarks


def without_counterpart(mlx: Trace, torch: Trace) -> set[str]:
    """Returns the names of values that one side lacks because its layer has other parts (`DIFFERENT_CALLS`).

    A port computes some layers of its original by functions, such as a head with the weight of an embedding.
    """
    if mlx.backend == torch.backend:
        return set()
    is_port = mlx.classes.get("") == _PORTED_MODEL
    found = set()
    for name in (*mlx.values, *torch.values):
        kind, _, path = name.partition(":")
        is_further = "[" in path and _common_kind(mlx, torch, path) in DIFFERENT_CALLS
        is_of_one = is_port and (name not in mlx.values or name not in torch.values)
        if kind == "module" and path and (is_further or is_of_one or _is_within_different(mlx, torch, path)):
            found.add(name)
    return found


def flattened_input(path: str, mlx: Trace, torch: Trace) -> str:
    """Returns a remark if MLX flattened `[B, *space, C]` where PyTorch flattened `[B, C, *space]`; else empty.

    Args:
        path: The layer that receives the flat array.
        mlx, torch: Traces of the same run.
    """
    if mlx.backend == torch.backend or path not in mlx.calls:
        return ""
    for ours, theirs in zip(mlx.calls[path].values, torch.calls[path].values, strict=False):
        a, b = ours.array, theirs.array
        if a.ndim != 2 or a.shape != b.shape or not ours.is_float or _distance(a, b) < _EQUAL:
            continue
        shapes = dict.fromkeys(value.array.shape for value in torch.of("module").values())
        for shape in shapes:
            fits = len(shape) > 2 and shape[0] == len(b) and math.prod(shape) == b.size
            if fits and _distance(a, to_mlx(MOVED, b.reshape(shape)).reshape(b.shape)) < _EQUAL:
                return "its input is flattened channels last: in MLX, write mx.moveaxis(x, -1, 1).flatten(1)"
    return ""


class ReplayError(Exception):
    """MLX fails on the inputs of PyTorch, or its outputs have no alignment; the message says why."""


class AlignedReplay:
    """Replays MLX's layers with arguments and results that have PyTorch's axes.

    Args:
        replay: Replay by MLX: called as `replay(path, call, cotangents)`.
        mlx, torch: Traces of the same run, whose calls are paired argument by argument.
    """

    def __init__(self, replay: Callable[..., dict[str, Value]], mlx: Trace, torch: Trace) -> None:
        self._replay, self._mlx, self._torch = replay, mlx, torch
        self._shapes = {} if mlx.backend == torch.backend else known_shapes(mlx, torch)

    def __call__(self, path: str, call: Call, cotangents: list[Value] | None) -> dict[str, Value]:
        """Calls the layer at `path`, for which `obstacle` returned nothing.

        Args:
            path: Path of the layer.
            call: The call of PyTorch, with the values to use.
            cotangents: Of the outputs of PyTorch.

        Returns:
            The results with the names and axes of PyTorch's. Results without a counterpart are left out.

        Raises:
            ReplayError: MLX fails, or an output has no alignment.
        """
        if self._mlx.backend == self._torch.backend:
            return self._replay(path, call, cotangents)
        inputs, outputs = self._inputs(path), self._outputs(path)
        values = dict(call.named)
        filled = {
            ours: Value(to_mlx(how, values[theirs].array), values[theirs].dtype) for ours, theirs, how in inputs
        }
        drawn = cotangents or []
        seeds = [
            Value(to_mlx(outputs[index], drawn[index].array), drawn[index].dtype)
            if index in outputs
            else Value(np.zeros_like(value.array), value.dtype)
            for index, value in enumerate(self._mlx.outputs(path).values())
            if cotangents is not None
        ]
        try:
            replayed = self._replay(path, self._mlx.calls[path].fill(filled), seeds or None)
        except Exception as error:  # whatever a user's layer raises is a result of the comparison
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ReplayError(f"fails in MLX on PyTorch's inputs: {reason}") from error
        return dict(self._aligned(path, replayed, inputs, outputs))

    def by(self, replay: Callable[..., dict[str, Value]]) -> AlignedReplay:
        """Returns the same with another replay by MLX."""
        return AlignedReplay(replay, self._mlx, self._torch)

    def obstacle(self, path: str) -> str:
        """Returns why the layer at `path` cannot be called with equal inputs on both sides; empty if it can."""
        if self._mlx.backend == self._torch.backend:
            return ""
        if path not in self._mlx.calls:
            return "not replayed: it has no arguments that can be stored in MLX"
        ours, theirs = self._arguments(path)
        if len(ours) != len(theirs):
            return f"not replayed: called with {len(ours)} arrays in MLX, {len(theirs)} in PyTorch"
        kind = self._kind(path)
        for name, other in self._pairs(path):
            if alignment(kind, ours[name].array, theirs[other].array, self._shapes) is None:
                return f"not replayed: input of {unequal_shapes(kind, ours[name].array, theirs[other].array)}"
        return ""

    def comparable(self, path: str, results: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the results of PyTorch's replay that have a counterpart in MLX.

        Left out are gradients of masks that are numbers on one side only, and, for layers whose calls differ between
        the frameworks (`DIFFERENT_CALLS`), further outputs and the gradients of parameters.
        """
        if self._mlx.backend == self._torch.backend:
            return dict(results)
        numbers = _float_numbers(self._torch.calls[path])
        shared = {f"input {numbers[theirs]}" for _, theirs, _ in self._inputs(path) if theirs in numbers}
        if self._kind(path) in DIFFERENT_CALLS:
            shared.add("output")
        else:
            prefix = f"{path}." if path else ""
            shared |= {
                name
                for name in results
                if not name.startswith("input ")
                and not _is_within_different(self._mlx, self._torch, prefix + name.removeprefix("gradient:"))
            }
        return {name: value for name, value in results.items() if name in shared}

    def cotangents(self, path: str, drawn: list[Value]) -> list[Value]:
        """Returns cotangents of the outputs of PyTorch: zero for outputs that have no counterpart in MLX."""
        if self._mlx.backend == self._torch.backend or self._kind(path) not in DIFFERENT_CALLS:
            return drawn
        return [drawn[0], *(Value(np.zeros_like(value.array), value.dtype) for value in drawn[1:])]

    def _aligned(
        self, path: str, replayed: Mapping[str, Value], inputs: list[tuple[str, str, str]], outputs: Mapping[int, str]
    ) -> Iterator[tuple[str, Value]]:
        """Yields the results of MLX's replay with PyTorch's names and axes."""
        for index, how in outputs.items():
            value = replayed[output_name(index)]
            yield output_name(index), Value(to_torch(how, value.array), value.dtype)
        our_numbers, their_numbers = _float_numbers(self._mlx.calls[path]), _float_numbers(self._torch.calls[path])
        for ours, theirs, how in inputs:
            if ours in our_numbers:
                value = replayed[f"input {our_numbers[ours]}"]
                yield f"input {their_numbers[theirs]}", Value(to_torch(how, value.array), value.dtype)
        yield from ((name, value) for name, value in replayed.items() if name.startswith("gradient "))

    def _kind(self, path: str) -> str | None:
        return _common_kind(self._mlx, self._torch, path)

    def _arguments(self, path: str) -> tuple[dict[str, Value], dict[str, Value]]:
        return dict(self._mlx.calls[path].named), dict(self._torch.calls[path].named)

    def _pairs(self, path: str) -> list[tuple[str, str]]:
        """Returns the names of the arguments in MLX and in PyTorch, paired by name, or else by position."""
        ours, theirs = self._arguments(path)
        pairs = zip(ours, ours if ours.keys() == theirs.keys() else theirs, strict=True)
        # a mask may be booleans on one side and numbers on the other: then each side keeps its own
        return [(name, other) for name, other in pairs if ours[name].is_float == theirs[other].is_float]

    def _inputs(self, path: str) -> list[tuple[str, str, str]]:
        """Returns MLX's name, PyTorch's name and the alignment of each argument that both sides receive."""
        ours, theirs = self._arguments(path)
        kind, shapes = self._kind(path), self._shapes
        pairs = [(a, b, alignment(kind, ours[a].array, theirs[b].array, shapes)) for a, b in self._pairs(path)]
        return [(a, b, how) for a, b, how in pairs if how is not None]

    def _outputs(self, path: str) -> dict[int, str]:
        """Returns the alignment of each output by its number.

        Raises:
            ReplayError: An output has no alignment.
        """
        ours, theirs = (list(trace.outputs(path).values()) for trace in (self._mlx, self._torch))
        kind, found = self._kind(path), {}
        if kind in DIFFERENT_CALLS:
            ours, theirs = ours[:1], theirs[:1]
        if len(ours) != len(theirs):
            raise ReplayError(f"{len(ours)} outputs in MLX, {len(theirs)} in PyTorch")
        for index, (output, exact) in enumerate(zip(ours, theirs, strict=True)):
            how = alignment(kind, output.array, exact.array, self._shapes)
            if how is None:
                raise ReplayError(unequal_shapes(kind, output.array, exact.array))
            found[index] = how
        return found


def _common_kind(mlx: Trace, torch: Trace, name: str) -> str | None:
    """Returns the layer kind of a module, by its path or the name of its output, if both sides agree on it."""
    path = name.removeprefix("module:").partition("#")[0].partition("[")[0]
    kind = torch.layer_kinds.get(path)
    return kind if kind == mlx.layer_kinds.get(path) else None


def _is_within_different(mlx: Trace, torch: Trace, path: str) -> bool:
    """Returns whether a module or parameter is within a layer of `DIFFERENT_CALLS`."""
    different = [layer for layer, kind in torch.layer_kinds.items() if kind in DIFFERENT_CALLS]
    return any(
        path.startswith(f"{layer}." if layer else "") and mlx.layer_kinds.get(layer) == torch.layer_kinds[layer]
        for layer in different
    )


def _float_numbers(call: Call) -> dict[str, int]:
    """Returns the number of each float argument among the float arguments, by name: `input 0`, `input 1`, ..."""
    floats = [name for name, value in call.named if value.is_float]
    return {name: number for number, name in enumerate(floats)}
