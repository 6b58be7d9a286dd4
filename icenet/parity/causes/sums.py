"""Causes in sums: an array that is added, left out, multiplied, or taken in the place of another one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.parity import align
from icenet.parity.calls.pairing import relative
from icenet.parity.calls.pairs import Pair
from icenet.parity.causes.calls import called_within
from icenet.parity.causes.trial import Trial
from icenet.parity.results.rows import index_of
from icenet.parity.trace import output_name

Array = npt.NDArray[Any]


def find_sums(trial: Trial) -> str:
    """Returns which array is added, left out or multiplied, if that explains the difference."""
    ours, exact = (np.asarray(values[trial.name].array, np.float64) for values in (trial.ours, trial.exact))
    if ours.shape != exact.shape or not np.isfinite(ours).all():
        return ""
    if not ours.any() and exact.any():
        return "it is zero in a" + (
            "" if trial.is_forward else ": stop_gradient, or a value that does not depend on it"
        )
    terms = _terms(trial, exact.shape)
    difference = ours - exact
    for label, array in terms:
        size = float(np.square(array).sum())
        factor = float((difference * array).sum()) / size if size else 0.0
        if not factor or exact.size <= 2 or not trial.explains_array(exact + factor * array):
            continue
        if abs(factor + 1) < 1e-4:
            return f"{label} is not {'added' if trial.is_forward else 'passed on, as by stop_gradient,'} in a"
        if abs(factor - 1) < 1e-4:
            return f"{label} is added once more in a"
        return f"{label} is added {abs(factor):.6g} times {'more' if factor > 0 else 'less'} in a"
    for label, array in terms:
        if trial.explains_array(array):
            return f"a takes {label} in its place"
    for (label, array), (other, taken) in itertools.permutations(terms, 2):
        change = array - taken
        size = float(np.square(change).sum())
        factor = float((difference * change).sum()) / size if size else 0.0
        if factor > 0 and exact.size > 2 and trial.explains_array(exact + factor * change):
            times = "" if abs(factor - 1) < 1e-4 else f", each multiplied by {factor:.6g}"
            return f"a adds {label} where b adds {other}{times}"
    return ""


def find_left_out(trial: Trial) -> str:
    """Returns which array is not added in `a`, as a residual."""
    exact = np.asarray(trial.exact[trial.name].array, np.float64)
    is_searched = trial.is_forward and exact.size > 2 and bool(np.any(trial.ours[trial.name].array))
    for label, array in _terms(trial, exact.shape) if is_searched else ():
        if trial.explains_array(exact - array):
            return "" if find_scale(trial) else f"{label} is not added in a"  # y of 2 y: by the later searches
    return ""


def find_exchanged(trial: Trial) -> str:
    """Returns which two calls get each what the other gets in `b`."""
    places = trial.pair.places()
    number = index_of(trial.name) if trial.name.startswith("output") else 0
    first = places[number][0] if number < len(places) else None
    for index, (second, _) in enumerate(places):
        name = output_name(index)
        if first is None or second is None or second is first or name not in trial.ours:
            continue
        theirs, ours = trial.exact[trial.name].array, trial.ours[name].array
        is_other = theirs.dtype.kind == "f" and align.is_near(ours, theirs)
        if is_other and trial.explains_array(np.asarray(trial.exact[name].array, np.float64)):
            names = [relative(child.path, trial.pair.path) for child in (first, second)]
            if first.path == second.path:
                names = [f"{names[0]} (call {child.b.call + 1})" for child in (first, second)]
            return f"{names[0]} and {names[1]} are exchanged in a: each gets what the other one gets in b"
    return ""


def find_overflow(trial: Trial) -> str:
    """Returns which mean is infinite in MLX because its sum exceeds the largest number of fp16."""
    if trial.c.a.backend != "mlx" or trial.c.dtype != "fp16" or not trial.is_forward:
        return ""
    ours, exact = (np.asarray(values[trial.name].array, np.float64) for values in (trial.ours, trial.exact))
    if ours.shape != exact.shape or np.isfinite(ours).all() or not np.isfinite(exact).all():
        return ""
    for (source, _), value in zip(trial.pair.input_places(), trial.given.values, strict=True):
        array = np.asarray(value.array, np.float64)
        counts = range(1, array.ndim + 1) if value.is_float else ()
        for axes in itertools.chain.from_iterable(itertools.combinations(range(array.ndim), n) for n in counts):
            mean = array.mean(axis=axes)
            if mean.size != exact.size or not np.allclose(mean, exact.reshape(mean.shape)):
                continue
            sums = np.abs(array).sum(axis=axes)[~np.isfinite(ours.reshape(mean.shape))]
            if (sums > np.finfo(np.float16).max).all():
                what = f"the mean of {array.size // mean.size} values of {_label(trial.pair, source)} overflows in a"
                return f"{what}: MLX sums fp16 in fp16, up to 65504, PyTorch in fp32; use x.astype(mx.float32)"
    return ""


def find_scale(trial: Trial) -> str:
    """Returns by which number the array is multiplied, if that explains the difference."""
    ours, exact = (np.asarray(values[trial.name].array, np.float64) for values in (trial.ours, trial.exact))
    size = float(np.square(exact).sum())
    factor = float((ours * exact).sum()) / size if size and ours.shape == exact.shape else 0.0
    if not factor or exact.size <= 2 or not trial.explains_array(factor * exact):
        return ""
    square = round(factor * factor)
    is_root = factor > 1.2 and abs(factor * factor - square) < 1e-4
    # 2 is the square root of 4 by chance, unless the array has such a size
    is_known = is_root and (square in exact.shape or abs(factor - round(factor)) > 1e-4)
    known = f", the square root of {square}," if is_known else ""
    return f"it is multiplied by {factor:.6g}{known} in a"


def find_parts(trial: Trial) -> str:
    """Returns what else of a larger array is taken, or which two arrays are exchanged, if that explains it."""
    if not trial.is_forward:
        return ""
    shape = trial.exact[trial.name].array.shape
    places = trial.pair.input_places()
    labels = [_label(trial.pair, source, number) for source, number in places]
    floats = [(label, value) for label, value in zip(labels, trial.given.values, strict=True) if value.is_float]
    for label, value in floats:
        array = np.asarray(value.array, np.float64)
        for axis in range(1 if array.ndim == len(shape) + 1 and shape else array.ndim, array.ndim):
            if array.shape[:axis] + array.shape[axis + 1 :] != shape:
                continue
            for index in range(min(array.shape[axis], 64)):
                if trial.explains_array(np.take(array, index, axis)):
                    return f"position {index} of axis {axis} of {label} is taken in a"
            for name in ("mean", "max", "sum", "min"):
                if trial.explains_array(getattr(array, name)(axis=axis)):
                    return f"the {name} over axis {axis} of {label} is taken in a"
        for mask_label, mask in zip(labels, trial.given.values, strict=True):
            weights = np.asarray(mask.array, np.float64)
            if array.ndim == 3 and weights.shape == array.shape[:2] and set(np.unique(weights)) == {0.0, 1.0}:
                total = np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
                if trial.explains_array(np.einsum("btd,bt->bd", array, weights) / total):
                    return (
                        f"the mean over axis 1 of {label} is taken in a, of the elements of the mask ({mask_label})"
                    )
        if array.ndim == len(shape) + 2:  # of images
            for axes in itertools.combinations(range(1, array.ndim), 2):
                if tuple(size for axis, size in enumerate(array.shape) if axis not in axes) != shape:
                    continue
                for name in ("mean", "max", "sum", "min"):
                    if trial.explains_array(getattr(array, name)(axis=axes)):
                        return f"the {name} over the axes {axes[0]} and {axes[1]} of {label} is taken in a"
    for index, value in enumerate(trial.given.values):
        for axis in [n for n, size in enumerate(value.array.shape) if size in (2, 3, 4) and not value.is_float]:
            flipped = list(trial.given.values)
            flipped[index] = replace(value, array=np.ascontiguousarray(np.flip(value.array, axis)))
            if value.array.ndim > 1 and trial.explains(trial.replay(values=flipped)):
                return f"{labels[index]} is taken in the reverse order along axis {axis} in a"
    indices = [index for index, value in enumerate(trial.given.values) if value.is_float]
    for i, j in list(itertools.combinations(indices, 2))[:20]:
        if trial.given.values[i].array.shape == trial.given.values[j].array.shape and labels[i] != labels[j]:
            exchanged = list(trial.given.values)
            exchanged[i], exchanged[j] = exchanged[j], exchanged[i]
            if trial.explains(trial.replay(values=exchanged)):
                return f"{labels[i]} and {labels[j]} are exchanged in a"
    return ""


def find_centred(trial: Trial) -> str:
    """Returns whether `a` subtracts the mean of what `b` normalizes: a layer norm where `b` has an RMS norm."""
    if not trial.is_forward:
        return ""
    labels = [_label(trial.pair, source) for source, _ in trial.pair.input_places()]
    for index, (label, value) in list(enumerate(zip(labels, trial.given.values, strict=True)))[:8]:
        if value.is_float and value.array.ndim > 1:
            array = np.asarray(value.array, np.float64)
            centred = list(trial.given.values)
            centred[index] = replace(value, array=array - array.mean(axis=-1, keepdims=True))
            if trial.explains(trial.replay(values=centred)):
                return f"the mean of {label} is subtracted in a: a layer norm in a, an RMS norm in b"
    return ""


def _label(pair: Pair, source: Pair | None, number: int = 0) -> str:
    """Returns what to call an output of a call within another one, or (None) an argument of that."""
    if source is None:
        return "the input"
    is_only = sum(child.path == source.path for child in pair.children) == 1
    output = source.b.output_label(number) if number else "output"
    return f"the {output} of {relative(source.path, pair.path)}" + ("" if is_only else f" (call {source.b.call + 1})")


def _terms(trial: Trial, shape: tuple[int, ...]) -> list[tuple[str, Array]]:
    """Returns the arrays of a shape that a call receives, with what to call them."""
    found: list[tuple[str, Array]] = []
    if trial.is_forward:
        found += [*_parameters(trial, shape), *_inputs(trial, shape)]
        # what a call gets unchanged has the name that it has already
        known = [array for _, array in found]
        computed = [*_computed_within(trial), *_inputs_of_calls(trial)]
        found += [(label, array) for label, array in computed if not any(np.array_equal(array, x) for x in known)]
    elif trial.given.cotangents is not None:
        for (source, _), value in zip(trial.pair.places(), trial.given.cotangents, strict=True):
            what = "the output" if source is None else f"the input of {relative(source.path, trial.pair.path)}"
            found.append((f"the gradient of {what}", np.asarray(value.array, np.float64)))
    kept: dict[str, Array] = {}
    for label, array in reversed(found):  # an array may be passed on unchanged: then the last call that returns it
        if array.shape == shape and len(kept) < 12:
            kept.setdefault(label, array)
    return list(kept.items())


def _parameters(trial: Trial, shape: tuple[int, ...]) -> Iterator[tuple[str, Array]]:
    """Yields the vectors of the calls within a call, and its own tables, repeated to a shape."""
    for child in trial.pair.children:
        for name, array in trial.c.reference.own_arrays(child.path).items():
            if shape and array.ndim == 1 and array.shape[0] in (shape[-1], shape[1] if len(shape) > 2 else -1):
                axes = [1] * len(shape)
                axes[-1 if array.shape[0] == shape[-1] else 1] = array.shape[0]
                label = f"{relative(child.path, trial.pair.path)}.{name}"
                yield label, np.broadcast_to(array.reshape(axes), shape)
    for name, array in trial.c.reference.own_arrays(trial.pair.path).items():
        rows = array[0] if array.ndim > 2 and array.shape[0] == 1 else array  # a table for all rows of a batch
        if (rows.ndim > 1 and shape[-rows.ndim :] == rows.shape) or (array.size > 1 and _fits(array, shape)):
            yield name, np.broadcast_to(np.asarray(array, np.float64), shape)


def _inputs(trial: Trial, shape: tuple[int, ...]) -> Iterator[tuple[str, Array]]:
    """Yields the inputs of a call and the outputs of the calls within it, also those of all steps of one, stacked."""
    stacks: dict[tuple[str, int], list[Array]] = {}
    for (source, number), value in zip(trial.pair.input_places(), trial.given.values, strict=True):
        array = np.asarray(value.array, np.float64)
        if source is not None:
            stacks.setdefault((source.path, number), []).append(array)
        if array.shape[-1:] == shape[-1:] and array.size == math.prod(shape):
            array = array.reshape(shape)  # [B * L, D] where the others are [B, L, D]
        array = np.broadcast_to(array, shape) if _fits(array, shape) else array
        yield _label(trial.pair, source, number), array
    for (path, number), arrays in stacks.items():
        if len(arrays) > 1 and len(shape) > 2 and {array.shape for array in arrays} == {shape[:1] + shape[2:]}:
            output = next(child.b.output_label(number) for child in trial.pair.children if child.path == path)
            yield f"the {output} of {relative(path, trial.pair.path)}, of all its calls,", np.stack(arrays, 1)


def _inputs_of_calls(trial: Trial) -> Iterator[tuple[str, Array]]:
    """Yields the exact inputs of the calls within a call that a replay computes besides the array that differs."""
    for index, (source, _) in enumerate(trial.pair.places()):
        name = output_name(index)
        if source is not None and name in trial.checked[1:]:
            label = f"the input of {relative(source.path, trial.pair.path)}"
            yield label, np.asarray(trial.exact[name].array, np.float64)


def _computed_within(trial: Trial) -> list[tuple[str, Array]]:
    """Returns the inputs and outputs of the modules of the reference that a replay computes, too."""
    c, pair = trial.c, trial.pair
    paths = set(called_within(pair, pair.b)) - {child.path for child in pair.children}
    if not paths or not c.computes_reference or c.reference.backend != "torch":
        return []
    found: list[tuple[str, Array]] = []

    def handle(path: str, call: Any, args: Any, kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        arrays: tuple[Any, Any] = next(iter((*args, *kwargs.values())), None), result
        for what, item in zip(("input", "output"), arrays, strict=True):
            if hasattr(item, "detach") and item.is_floating_point():
                found.append((f"the {what} of {relative(path, pair.path)}", item.detach().double().numpy()))
        return result

    with c.reference.tools.intercepting({path: c.reference.modules[path] for path in paths}, handle):
        trial.replay()
    return found


def _fits(array: Array, shape: tuple[int, ...]) -> bool:
    """Returns whether an array of as many axes can be repeated to a shape."""
    return array.ndim == len(shape) and all(n in (1, m) for n, m in zip(array.shape, shape, strict=True))
