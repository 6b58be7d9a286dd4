"""Causes in the weights of a layer: the order of gates and projections, a bias that is not used."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from icenet.parity.causes.trial import Trial
from icenet.parity.state import Comparison

if TYPE_CHECKING:
    pass

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
            for value in (0, 1):
                if trial.explains(trial.replay({name: np.full_like(weights[name], value)})):
                    return f"{name} is not used in a"
            square = weights[name]
            is_square = square.ndim == 2 and square.shape[0] == square.shape[1]
            if is_square and trial.explains(trial.replay({name: np.ascontiguousarray(square.T)})):
                return f"{name} is transposed in a"
    finally:
        pair.parameters = before
    return ""


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
