"""Causes in the weights of a layer: the order of gates and projections, a bias that is not used."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.parity.causes.trial import Trial
from icenet.parity.state import Comparison
from icenet.parity.trace import Value

Array = npt.NDArray[Any]

_GATES = {
    "LSTM": ("i", "f", "g", "o"),
    "LSTMCell": ("i", "f", "g", "o"),
    "GRU": ("r", "z", "n"),
    "GRUCell": ("r", "z", "n"),
}


def find_weights(trial: Trial) -> str:
    """Returns which parameters of a layer are in another order or not used, if that explains the difference."""
    if trial.c.reference.backend != "torch":
        return ""
    side, pair = trial.c.reference, trial.pair
    weights = side.own_arrays(pair.path)
    names = [name for name in weights if name in side.parameters_within(pair.path)]
    before, pair.parameters = pair.parameters, names
    try:
        kind = type(trial.modules[1]).__name__
        gates = _GATES.get(kind)
        if gates is not None:
            for order in itertools.permutations(range(len(gates))):
                new = {name: _reordered(weights[name], order) for name in names}
                if order != tuple(range(len(gates))) and trial.explains(trial.replay(new)):
                    listed = " ".join(gates[i] for i in order)
                    return f"gate order: the gates of the weights of a are those of b in the order {listed}"
        packed = [name for name in names if name.startswith("in_proj")]
        for order in itertools.permutations(range(3)) if packed else ():
            new = {name: _reordered(weights[name], order) for name in packed}
            if order != (0, 1, 2) and trial.explains(trial.replay(new)):
                listed = " ".join("qkv"[i] for i in order)
                return f"the projections q k v of a are those of b in the order {listed}"
        for name in names:
            array = weights[name]
            square = array.swapaxes(-1, -2) if array.ndim > 1 else array
            is_square = array.ndim > 1 and square.shape == array.shape
            if is_square and trial.explains(trial.replay({name: np.ascontiguousarray(square)})):
                return f"{name} is transposed in a"
            last = np.moveaxis(array, -1, 1) if array.ndim > 2 else array
            is_cube = array.ndim > 2 and last.shape == array.shape
            if is_cube and trial.explains(trial.replay({name: np.ascontiguousarray(last)})):
                return (
                    f"{name} has its channels last in a, first in b: if it is the weight of a convolution, name its "
                    f'kind in the class, layer_kind = "plain {name}=conv{array.ndim - 2}d"'
                )
    finally:
        pair.parameters = before
    return ""


def find_unused(trial: Trial) -> str:
    """Returns which parameter of a module is not used in `a`: as if it were 0, or 1."""
    if trial.c.reference.backend != "torch":
        return ""
    weights = trial.c.reference.own_arrays(trial.pair.path)
    for name in [name for name in weights if name in trial.c.reference.parameters_within(trial.pair.path)]:
        for value in (0, 1):
            if trial.explains(with_weights(trial, {name: np.full_like(weights[name], value)})):
                return f"{name} is not used in a"
    return ""


def find_offset(trial: Trial) -> str:
    """Returns whether one side adds 1 to the weight of a norm, as the models of Gemma do."""
    if trial.c.reference.backend != "torch":
        return ""
    weights = trial.c.reference.own_arrays(trial.pair.path)
    vectors = [name for name, array in weights.items() if array.ndim == 1 and "bias" not in name]
    for name in [name for name in vectors if name in trial.c.reference.parameters_within(trial.pair.path)]:
        for by, text in ((1, f"1 + {name} in a, {name} in b"), (-1, f"{name} in a, 1 + {name} in b")):
            if trial.explains(with_weights(trial, {name: weights[name] + by})):
                return f"{text}, as in a norm of Gemma"
    for name in [name for name in weights if name in trial.c.reference.parameters_within(trial.pair.path)]:
        if trial.explains(with_weights(trial, {name: 1 - weights[name]})):
            return f"1 - {name} in a, {name} in b, such as the other part of a mixture of two arrays"
    return ""


def find_tied(trial: Trial) -> str:
    """Returns which parameter `a` takes in place of another one, such as that of an embedding for the output."""
    c, pair = trial.c, trial.pair
    if c.reference.backend != "torch" or not trial.is_forward:
        return ""
    prefix = f"{pair.path}." if pair.path else ""
    held, ours = c.reference.weights(), c.a.weights()
    theirs = {name: held[prefix + name] for name in c.reference.parameters_within(pair.path)}
    only = {name: array for name, array in ours.items() if name not in c.parameter_names}
    for name, array in theirs.items():
        if array.ndim < 2:
            continue
        for others, side in ((theirs, "b"), (only, "a")):
            for other, taken in others.items():
                if taken.shape != array.shape or taken is array or np.array_equal(taken, array):
                    continue
                if trial.explains(with_weights(trial, {name: np.asarray(taken)})):
                    if side == "b":
                        return f"a takes {other} where b takes {name}"
                    return f"{other} is a parameter of its own in a, {name} in b (tied weights)"
    return ""


def with_weights(trial: Trial, weights: Mapping[str, Array]) -> dict[str, Value]:
    """Returns what the reference computes with other parameters, by path within the module."""
    before, trial.pair.parameters = trial.pair.parameters, list(weights)
    try:
        return trial.replay(weights)
    finally:
        trial.pair.parameters = before


def find_untied(c: Comparison, path: str) -> str:
    """Returns which parameter of a module of `b` is tied to another one, but is one of its own in `a`."""
    module = getattr(c.reference, "module", None)
    if c.reference.backend != "torch" or module is None:
        return ""
    named = dict(module.named_parameters(remove_duplicate=False))
    held = set(c.parameter_names.values()) & named.keys()
    for name in held:
        if name.rpartition(".")[0] == path:
            for other in sorted(held - {name}):
                if named[other] is named[name]:
                    return f"{other} is {name} in b (tied weights), a parameter of its own in a"
    return ""


def _reordered(array: Array, order: Sequence[int]) -> Array:
    blocks = np.split(array, len(order))
    return np.concatenate([blocks[index] for index in order])
