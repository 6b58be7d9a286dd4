"""Causes in arrays that a module holds: a table or a mask with other values, and two arrays that are exchanged."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.parity.causes.trial import Trial
from icenet.parity.causes.weights import with_weights

Array = npt.NDArray[Any]

_MOST = 6
"""Number of arrays of a module that are tried."""

_FACTORS = {
    1 / math.pi: "1 / pi",
    math.pi: "pi",
    0.5 / math.pi: "1 / (2 pi)",
    2 * math.pi: "2 pi",
    0.5: "1 / 2",
    2.0: "2",
    0.1: "1 / 10",
    10.0: "10",
}
"""Numbers by which an array that a module holds is often multiplied, and their names."""


def find_constants(trial: Trial) -> str:
    """Returns which buffer or other held array has other values in `a`, or which two arrays are exchanged."""
    if trial.c.reference.backend != "torch" or not trial.c.computes_reference or not trial.is_forward:
        return ""
    ours, theirs = (_constants(module, backends.backend_of(module)) for module in trial.modules)
    for name, array in list(theirs.items())[:_MOST]:
        known = sorted(ours.items(), key=lambda item: item[0].strip("_") != name.strip("_"))
        for own, found in known:
            other = _as_rows(found, array)
            if other.shape != array.shape or np.allclose(other, array):
                continue
            with _replaced(trial.modules[1], name, other):
                if trial.explains(trial.replay()):
                    what = next((text for text, new in _changes(array) if np.allclose(other, new)), "other values")
                    return f"{name} of b has {what} in a{'' if own.strip('_') == name.strip('_') else f', in {own}'}"
        for text, new in _changes(array):
            with _replaced(trial.modules[1], name, new):
                if trial.explains(trial.replay()):
                    return f"{name} of b has {text} in a"
    side, pair = trial.c.reference, trial.pair
    held, trained = side.own_arrays(pair.path), set(side.parameters_within(pair.path))
    weights = {name: array for name, array in held.items() if name in trained}
    for first, second in itertools.combinations(list(weights)[: 2 * _MOST], 2):
        x, y = weights[first], weights[second]
        if x.shape == y.shape and trial.explains(with_weights(trial, {first: y, second: x})):
            return f"{first} and {second} are exchanged in a"
    return ""


def find_factors(trial: Trial) -> str:
    """Returns by which number a buffer or other held array is multiplied in `a`, such as frequencies without pi."""
    if trial.c.reference.backend != "torch" or not trial.is_forward:
        return ""
    for name, array in list(_constants(trial.modules[1], "torch").items())[:_MOST]:
        for factor, text in _FACTORS.items() if array.any() else ():
            with _replaced(trial.modules[1], name, factor * array):
                if trial.explains(trial.replay()):
                    return f"{name} of b is multiplied by {text} in a"
    return ""


def _constants(module: Any, backend: str) -> dict[str, Array]:
    """Returns the arrays that a module holds itself, and that are no trained parameters of PyTorch."""
    to_numpy = backends.module(backend, "tools.probe").to_numpy
    kind = backends.module(backend, "tools.calls").ARRAY
    own = dict(module) if isinstance(module, dict) else getattr(module, "_buffers", {})
    held = {**own, **{name: item for name, item in vars(module).items() if name != "_buffers"}}
    found = {name: item for name, item in held.items() if isinstance(item, kind) and "complex" not in str(item.dtype)}
    return {name: np.asarray(to_numpy(item), np.float64) for name, item in found.items()}


def _as_rows(found: Array, array: Array) -> Array:
    """Returns an array, repeated if the other one has equal rows of its shape."""
    is_row = 0 < found.ndim < array.ndim and array.shape[-found.ndim :] == found.shape
    rows = array.reshape(-1, *found.shape) if is_row else array
    return np.broadcast_to(found, array.shape) if is_row and (rows == rows[:1]).all() else found


def _changes(array: Array) -> Iterator[tuple[str, Array]]:
    """Yields mistakes in an array, and what to call them."""
    if np.isin(array, (0, 1)).all():
        yield "its ones and zeros exchanged", 1 - array
    if array.ndim and array.shape[-1] % 2 == 0 and array.shape[-1] > 2:
        half = array.shape[-1] // 2
        yield "its halves exchanged", np.roll(array, half, -1)
        for text, split in (("its halves interleaved", (2, half)), ("its pairs taken apart to halves", (half, 2))):
            yield text, array.reshape(*array.shape[:-1], *split).swapaxes(-1, -2).reshape(array.shape)
    if array.ndim > 1 and array.shape[-1] == array.shape[-2]:
        yield "its last axes exchanged", array.swapaxes(-1, -2)
    yield "the other sign", -array


@contextlib.contextmanager
def _replaced(module: Any, name: str, array: Array) -> Iterator[None]:
    """Gives a module of PyTorch another array while the context is open."""
    held = module._buffers if name in module._buffers else vars(module)
    before = held[name]
    held[name] = before.new_tensor(np.ascontiguousarray(array))
    try:
        yield
    finally:
        held[name] = before
