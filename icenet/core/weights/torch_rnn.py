"""Converts the weights of `torch.nn.LSTM`, `GRU` and `RNN` to those of IceNet's recurrent layers, and back.

PyTorch's modules add two biases to every gate, `bias_ih` and `bias_hh`. Only their sum matters, except for the n gate
of a GRU, whose recurrent bias is multiplied by the reset gate. IceNet's layers have one bias per gate, because a sum
of two is trained at twice the speed. Importing adds the two biases; exporting writes zeros for the second.

    PyTorch                                           IceNet
    weight_ih_l0, weight_hh_l0, ...                   layers.0.weight_ih, layers.0.weight_hh, ...
    bias_ih_l0 + bias_hh_l0                           layers.0.bias
    rows of the n gate in bias_hh_l0 (GRU)            layers.0.bias_hn
    weight_ih_l1_reverse, ...                         layers.1.weight_ih_reverse, ...

The gates have the same order on both sides: i, f, g, o for an LSTM; r, z, n for a GRU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import WeightsError

Array = NDArray[Any]

GATES = {"lstm": 4, "gru": 3, "rnn": 1}

_TORCH_NAME = re.compile(r"(weight_ih|weight_hh|bias_ih|bias_hh)_l(\d+)(_reverse)?")
_OUR_NAME = re.compile(r"layers\.(\d+)\.(weight_ih|weight_hh|bias|bias_hn)(_reverse)?")


def from_torch(weights: Mapping[str, Array], family: str, gradients: bool = False) -> dict[str, Array]:
    """Converts the state dict of PyTorch's module to the weights of IceNet's layers.

    Args:
        weights: The state dict, as floating-point numpy arrays. Missing biases (`bias=False`) become zeros.
        family: "lstm", "gru" or "rnn".
        gradients: The arrays are gradients of the weights. The gradient of a sum is that of each of the two biases.

    Raises:
        WeightsError: A name does not belong to such a module, or a weight is missing or has another shape.
    """
    gates = _gates(family)
    layers: dict[tuple[int, str], dict[str, Array]] = {}
    for name, array in weights.items():
        match = _TORCH_NAME.fullmatch(name)
        if match is None:
            hint = "; projections (proj_size) have no counterpart" if name.startswith("weight_hr") else ""
            raise WeightsError(f"{name!r} is not a weight of torch.nn.{family.upper()}{hint}")
        if not (np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16):
            raise WeightsError(f"{name!r} has dtype {array.dtype}; convert it to float16, float32 or float64")
        layers.setdefault((int(match[2]), match[3] or ""), {})[match[1]] = array
    result: dict[str, Array] = {}
    for (index, direction), found in sorted(layers.items()):
        for part in ("weight_ih", "weight_hh"):
            if part not in found:
                raise WeightsError(f"{part}_l{index}{direction}: missing")
        rows, size = found["weight_hh"].shape
        if rows != gates * size:
            raise WeightsError(
                f"weight_hh_l{index}{direction} has shape {[rows, size]}, not {[gates * size, size]} "
                f"for the {gates} gates of {family}"
            )
        zeros = np.zeros(rows, found["weight_hh"].dtype)
        first, second = found.get("bias_ih", zeros), found.get("bias_hh", zeros)
        n_gate = slice(2 * size, None) if family == "gru" else slice(rows, None)  # empty for other families
        bias = first.copy() if gradients else _sum(first, second)
        bias[n_gate] = first[n_gate]
        path = f"layers.{index}."
        result[f"{path}weight_ih{direction}"] = found["weight_ih"]
        result[f"{path}weight_hh{direction}"] = found["weight_hh"]
        result[f"{path}bias{direction}"] = bias
        if family == "gru":
            result[f"{path}bias_hn{direction}"] = second[n_gate].copy()
    return result


def to_torch(weights: Mapping[str, Array], family: str, gradients: bool = False) -> dict[str, Array]:
    """Converts the weights of IceNet's layers to a state dict for PyTorch's module. The inverse of `from_torch`.

    Args:
        weights: Weights of the layers or of a whole model, whose other parameters are ignored.
        family: "lstm", "gru" or "rnn".
        gradients: The arrays are gradients of the weights.

    Raises:
        WeightsError: A name below `layers.` does not belong to a recurrent layer.
    """
    gates = _gates(family)
    result: dict[str, Array] = {}
    for name, array in weights.items():
        match = _OUR_NAME.fullmatch(name)
        if match is None:
            if name.startswith("layers."):
                raise WeightsError(f"{name!r} is not a weight of a recurrent layer")
            continue
        suffix = f"_l{match[1]}{match[3] or ''}"
        if match[2] in ("weight_ih", "weight_hh"):
            result[match[2] + suffix] = array
        elif match[2] == "bias":
            result["bias_ih" + suffix] = array
            second = array.copy() if gradients else np.zeros_like(array)
            if family == "gru":
                second[2 * (len(array) // gates) :] = weights[f"layers.{match[1]}.bias_hn{match[3] or ''}"]
            result["bias_hh" + suffix] = second
    return result


def _sum(first: Array, second: Array) -> Array:
    """Returns the sum of two biases; of bf16 and fp16 in fp32, because the target may have fp32."""
    wide = np.promote_types(first.dtype, np.float32) if first.dtype != ml_dtypes.bfloat16 else np.dtype(np.float32)
    total: Array = np.where(second == 0, first.astype(wide), first.astype(wide) + second.astype(wide))  # keeps -0.0
    return total


def _gates(family: str) -> int:
    if family not in GATES:
        raise WeightsError(f"unknown recurrent family {family!r}; give one of {', '.join(GATES)}")
    return GATES[family]
