"""Weights of `torch.nn.LSTM`, `GRU` and `RNN` as those of IceNet's recurrent layers, and back; numpy alone.

PyTorch's modules add two biases to every gate, `bias_ih` and `bias_hh`, of which only the sum matters; but for
the n gate of a GRU, whose recurrent bias stands inside the reset. IceNet's layers have one bias a gate, since
two would be trained at twice the speed: importing adds the two up, exporting writes zeros for the second.

    weight_ih_l0, weight_hh_l0, ...                   layers.0.weight_ih, layers.0.weight_hh
    bias_ih_l0 + bias_hh_l0                           layers.0.bias
    the n gate's part of bias_hh_l0 (GRU)             layers.0.bias_hn
    weight_ih_l1_reverse, ...                         layers.1.weight_ih_reverse, ...

Rows are in the same order on both sides: gates i, f, g, o of an LSTM, r, z, n of a GRU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import WeightsError

Array = NDArray[Any]

GATES = {"lstm": 4, "gru": 3, "rnn": 1}

_TORCH_NAME = re.compile(r"(weight_ih|weight_hh|bias_ih|bias_hh)_l(\d+)(_reverse)?")
_OUR_NAME = re.compile(r"layers\.(\d+)\.(weight_ih|weight_hh|bias|bias_hn)(_reverse)?")


def from_torch(weights: Mapping[str, Array], family: str) -> dict[str, Array]:
    """The layers of a model of a family (lstm, gru, rnn) from the state dict of PyTorch's module.

    A module made with `bias=False` has biases of zero here.

    Raises:
        WeightsError: a name that no such module has, a weight missing, or one of another shape.
    """
    gates = _gates(family)
    layers: dict[tuple[int, str], dict[str, Array]] = {}
    for name, array in weights.items():
        match = _TORCH_NAME.fullmatch(name)
        if match is None:
            hint = "; projections (proj_size) have no counterpart" if name.startswith("weight_hr") else ""
            raise WeightsError(f"{name!r} is no weight of torch.nn.{family.upper()}{hint}")
        if not np.issubdtype(array.dtype, np.floating):
            raise WeightsError(f"{name!r} is of {array.dtype}; give it as float16, float32 or float64")
        layers.setdefault((int(match[2]), match[3] or ""), {})[match[1]] = array
    result: dict[str, Array] = {}
    for (index, direction), found in sorted(layers.items()):
        for part in ("weight_ih", "weight_hh"):
            if part not in found:
                raise WeightsError(f"{part}_l{index}{direction}: not there")
        rows, size = found["weight_hh"].shape
        if rows != gates * size:
            raise WeightsError(
                f"weight_hh_l{index}{direction} is {[rows, size]}; "
                f"the {gates} gates of {family} make it {[gates * size, size]}"
            )
        zeros = np.zeros(rows, found["weight_hh"].dtype)
        first, second = found.get("bias_ih", zeros), found.get("bias_hh", zeros)
        inside = slice(2 * size, None) if family == "gru" else slice(rows, None)  # of the reset
        bias = first + second
        bias[inside] = first[inside]
        path = f"layers.{index}."
        result[f"{path}weight_ih{direction}"] = found["weight_ih"]
        result[f"{path}weight_hh{direction}"] = found["weight_hh"]
        result[f"{path}bias{direction}"] = bias
        if family == "gru":
            result[f"{path}bias_hn{direction}"] = second[inside].copy()
    return result


def to_torch(weights: Mapping[str, Array], family: str) -> dict[str, Array]:
    """The inverse of `from_torch`: a state dict for PyTorch's module, the second biases zero.

    Takes the weights of a whole model too: what is not below `layers.` is passed over.
    """
    gates = _gates(family)
    result: dict[str, Array] = {}
    for name, array in weights.items():
        match = _OUR_NAME.fullmatch(name)
        if match is None:
            if name.startswith("layers."):
                raise WeightsError(f"{name!r} is no weight of a recurrent layer")
            continue
        suffix = f"_l{match[1]}{match[3] or ''}"
        if match[2] in ("weight_ih", "weight_hh"):
            result[match[2] + suffix] = array
        elif match[2] == "bias":
            result["bias_ih" + suffix] = array
            second = np.zeros_like(array)
            if family == "gru":
                second[2 * (len(array) // gates) :] = weights[f"layers.{match[1]}.bias_hn{match[3] or ''}"]
            result["bias_hh" + suffix] = second
    return result


def _gates(family: str) -> int:
    if family not in GATES:
        raise WeightsError(f"no recurrent family {family!r}; one of {', '.join(GATES)}")
    return GATES[family]
