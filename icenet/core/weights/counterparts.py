"""Layers of MLX whose PyTorch counterparts have other names or another number of arrays.

    MLX                                               PyTorch
    MultiHeadAttention                                MultiheadAttention
      query_proj.weight, key_proj.weight,               in_proj_weight: the three, one below the other; with kdim or
      value_proj.weight                                 vdim q_proj_weight, k_proj_weight, v_proj_weight
      query_proj.bias, key_proj.bias, value_proj.bias   in_proj_bias
    LSTM, GRU, RNN                                    LSTM, GRU, RNN with one layer
      Wx, Wh (RNN: Wxh, Whh)                            weight_ih_l0, weight_hh_l0
      bias (GRU: b)                                     bias_ih_l0 + bias_hh_l0
      bhn (GRU)                                         rows of the n gate in bias_hh_l0
    TransformerEncoderLayer                           TransformerEncoderLayer
      attention, ln1, ln2                               self_attn, norm1, norm2
    TransformerDecoderLayer                           TransformerDecoderLayer
      self_attention, cross_attention, ln1, ln2, ln3    self_attn, multihead_attn, norm1, norm2, norm3
    TransformerEncoder, TransformerDecoder            TransformerEncoder, TransformerDecoder
      ln                                                norm

IceNet's recurrent layers (`icenet.nn.LSTM`) have counterparts in `torch.nn` too. The kind of counterpart of each
class is in `icenet/nn/kinds.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.weights import torch_rnn

Array = NDArray[Any]
Shape = tuple[int, ...]

CHILD_NAMES: dict[str, dict[str, str]] = {
    "transformer_encoder_layer": {"attention": "self_attn", "ln1": "norm1", "ln2": "norm2"},
    "transformer_decoder_layer": {
        "self_attention": "self_attn",
        "cross_attention": "multihead_attn",
        "ln1": "norm1",
        "ln2": "norm2",
        "ln3": "norm3",
    },
    "transformer": {"ln": "norm"},
}
"""Name in PyTorch of the parts of a layer, by kind of the layer and name in MLX."""

ATTENTION_OF: dict[str, tuple[str, ...]] = {
    "transformer_encoder_layer": ("attention",),
    "transformer_decoder_layer": ("self_attention", "cross_attention"),
}
"""The attention of the layers that have no option for its biases in MLX, while PyTorch has them by default."""

NOT_CONVERTED: dict[str, str] = {
    "quantized": "copy the weights of the module before it is quantized",
    "sharded": "copy the weights of the module before it is sharded",
}
"""Kinds of MLX that have no counterpart, and what to do instead."""

PROJECTIONS = ("query_proj", "key_proj", "value_proj")

_RECURRENT: dict[str, dict[str, str]] = {
    "lstm": {"Wx": "weight_ih", "Wh": "weight_hh", "bias": "bias"},
    "gru": {"Wx": "weight_ih", "Wh": "weight_hh", "b": "bias", "bhn": "bias_hn"},
    "rnn": {"Wxh": "weight_ih", "Whh": "weight_hh", "bias": "bias"},
}
"""Name in IceNet's recurrent layers of each array of MLX's."""


@dataclass(frozen=True, eq=False)
class Counterpart:
    """A layer of MLX with other arrays in PyTorch.

    Attributes:
        path: Its canonical path in the MLX module.
        own: Canonical shape of each of its arrays in MLX, by the name in the layer.
        theirs: Shape of each of its arrays in PyTorch, by the name in the layer.
    """

    path: str
    own: dict[str, Shape]
    theirs: dict[str, Shape]

    def to_mlx(self, values: Mapping[str, Array], gradients: bool) -> dict[str, Array]:
        """Returns the arrays `own` from the arrays `theirs`, which may be gradients of the weights.

        Arrays that are made of missing ones are left out.
        """
        raise NotImplementedError

    def to_torch(self, values: Mapping[str, Array], gradients: bool) -> dict[str, Array]:
        """Returns the arrays `theirs` from the arrays `own`. Arrays that are made of missing ones are left out."""
        raise NotImplementedError

    def sources(self, name: str) -> list[str]:
        """Returns the names of the arrays in MLX from which an array of PyTorch is made."""
        raise NotImplementedError

    def complete(self, values: Mapping[str, Array]) -> list[str]:
        """Returns the names of the arrays of PyTorch all of whose parts are given."""
        return [name for name in self.theirs if all(own in values for own in self.sources(name))]


class _Attention(Counterpart):
    """`in_proj_weight` and `in_proj_bias`, or the three matrices that PyTorch has with kdim or vdim."""

    def sources(self, name: str) -> list[str]:
        part = name.rpartition("_")[2]
        if name.startswith("in_proj"):
            return [f"{projection}.{part}" for projection in PROJECTIONS]
        return [f"{PROJECTIONS['qkv'.index(name[0])]}.{part}"]

    def to_mlx(self, values: Mapping[str, Array], gradients: bool) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for name, array in values.items():
            sources = self.sources(name)
            ends = np.cumsum([self.own[source][0] for source in sources])[:-1]
            found |= dict(zip(sources, np.split(array, ends), strict=True))
        return found

    def to_torch(self, values: Mapping[str, Array], gradients: bool) -> dict[str, Array]:
        return {name: np.concatenate([values[own] for own in self.sources(name)]) for name in self.complete(values)}


@dataclass(frozen=True, eq=False)
class _Recurrent(Counterpart):
    """One layer of `torch.nn.LSTM`, `GRU` or `RNN`, whose second bias is added to the first one."""

    family: str = "lstm"

    def sources(self, name: str) -> list[str]:
        theirs = name.replace("_l0", "")
        names = {"bias_ih": ["bias"], "bias_hh": ["bias_hn", "bias"]}
        part, reverse = theirs.removesuffix("_reverse"), "_reverse" if theirs.endswith("_reverse") else ""
        standard = [f"{own}{reverse}" for own in names.get(part, [part])]
        return [own for own in self.own if self._standard(own) in standard]

    def to_mlx(self, values: Mapping[str, Array], gradients: bool) -> dict[str, Array]:
        if not values.keys() >= self.theirs.keys():
            return {}
        found = torch_rnn.from_torch(values, self.family, gradients)
        return {name: found[f"layers.0.{self._standard(name)}"] for name in self.own}

    def to_torch(self, values: Mapping[str, Array], gradients: bool) -> dict[str, Array]:
        named = {f"layers.0.{self._standard(name)}": array for name, array in values.items()}
        for name in [name for name in named if name.endswith((".bias", ".bias_reverse"))]:
            rows = len(named[name]) // torch_rnn.GATES[self.family]
            named.setdefault(name.replace(".bias", ".bias_hn"), named[name][-rows:])  # of a result that is left out
        found = torch_rnn.to_torch(named, self.family, gradients)
        return {name: found[name] for name in self.complete(values)}

    def _standard(self, name: str) -> str:
        """Returns the name of an array in IceNet's recurrent layers."""
        return next((table[name] for table in _RECURRENT.values() if name in table), name)


def counterpart(kind: str, path: str, own: Mapping[str, Shape]) -> Counterpart | None:
    """Returns the counterpart of a layer of MLX; None if it has none or holds other arrays than its class defines.

    Args:
        kind: "attention", "lstm", "gru", "rnn" or "recurrent".
        path: Canonical path of the layer.
        own: Canonical shape of each array in the layer and below, by its name in the layer.
    """
    if kind == "attention":
        return _attention(path, own)
    if kind == "recurrent" or kind in _RECURRENT:
        return _recurrent(kind, path, own)
    return None


def _attention(path: str, given: Mapping[str, Shape]) -> Counterpart | None:
    own = {name: shape for name, shape in given.items() if name.partition(".")[0] in PROJECTIONS}
    weights, biases = ([f"{projection}.{part}" for projection in PROJECTIONS] for part in ("weight", "bias"))
    if set(own) not in (set(weights), {*weights, *biases}):  # adapters, or quantized layers
        return None
    (rows, width), *_ = shapes = [own[name] for name in weights]
    if all(shape == (rows, rows) for shape in shapes) and rows == width:  # as PyTorch decides
        theirs: dict[str, Shape] = {"in_proj_weight": (3 * rows, rows)}
    else:
        theirs = {f"{name}_proj_weight": shape for name, shape in zip("qkv", shapes, strict=True)}
    if biases[0] in own:
        theirs["in_proj_bias"] = (sum(own[name][0] for name in biases),)
    return _Attention(path, own, theirs)


def _recurrent(kind: str, path: str, own: Mapping[str, Shape]) -> Counterpart | None:
    names = _RECURRENT.get(kind) or {name: name for name in own}
    standard = {names[name]: shape for name, shape in own.items() if name in names}
    if len(standard) != len(own) or not {"weight_ih", "weight_hh"} <= set(standard):
        return None
    theirs: dict[str, Shape] = {}
    for name, shape in standard.items():
        part, reverse = name.removesuffix("_reverse"), "_reverse" if name.endswith("_reverse") else ""
        if part in ("weight_ih", "weight_hh"):
            theirs[f"{part}_l0{reverse}"] = shape
        elif part == "bias":
            theirs |= {f"bias_ih_l0{reverse}": shape, f"bias_hh_l0{reverse}": shape}
    rows, size = standard["weight_hh"]
    family = kind if kind in _RECURRENT else next(f for f, gates in torch_rnn.GATES.items() if gates * size == rows)
    return _Recurrent(path, dict(own), theirs, family)
