"""Layer kinds: the row of the table in `icenet.core.weights.layout` for each layer class of MLX."""

from __future__ import annotations

from collections.abc import Iterable

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

_NATIVE_KINDS: dict[type, str] = {
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    nn.Bilinear: "bilinear",
    nn.LayerNorm: "layer_norm",
    nn.RMSNorm: "rms_norm",
    nn.GroupNorm: "group_norm",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.BatchNorm: "batch_norm",
}

# Layers without parameters, or whose parameters have no kind, that define the axes of their inputs and outputs.
_CALL_KINDS: dict[type, str] = {
    nn.InstanceNorm: "instance_norm",
    nn.MaxPool1d: "pool",
    nn.MaxPool2d: "pool",
    nn.MaxPool3d: "pool",
    nn.AvgPool1d: "pool",
    nn.AvgPool2d: "pool",
    nn.AvgPool3d: "pool",
    nn.Upsample: "upsample",
    nn.MultiHeadAttention: "attention",
    nn.LSTM: "native_recurrent",
    nn.GRU: "native_recurrent",
    nn.RNN: "native_recurrent",
}

# Layers whose counterparts in PyTorch have other names, or that have none (see `icenet.core.weights.counterparts`).
_COUNTERPARTS: dict[type, str] = {
    nn.MultiHeadAttention: "attention",
    nn.LSTM: "lstm",
    nn.GRU: "gru",
    nn.RNN: "rnn",
    nn.TransformerEncoderLayer: "transformer_encoder_layer",
    nn.TransformerDecoderLayer: "transformer_decoder_layer",
    nn.TransformerEncoder: "transformer",
    nn.TransformerDecoder: "transformer",
}
_WITHOUT_COUNTERPART = {
    "quantized": ("QuantizedLinear", "QuantizedEmbedding", "QQLinear"),
    "sharded": (
        "AllToShardedLinear",
        "ShardedToAllLinear",
        "QuantizedAllToShardedLinear",
        "QuantizedShardedToAllLinear",
        "FullyShardedModule",
    ),
}
# not every version of MLX has all of them
_COUNTERPARTS |= {
    getattr(nn, name): kind for kind, names in _WITHOUT_COUNTERPART.items() for name in names if hasattr(nn, name)
}


def kind_of(module: nn.Module) -> str | None:
    """Returns the kind of a layer with parameters (see `icenet.core.weights.layout`), or None without parameters.

    A module class can name its kind in `layer_kind`. Other modules that hold arrays are of kind "plain".
    """
    known = _known_kind(module, _NATIVE_KINDS)
    holds_arrays = any(isinstance(value, mx.array) and not name.startswith("_") for name, value in module.items())
    return known or ("plain" if holds_arrays else None)


def call_kinds(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    """Returns the kind of each module whose class defines the axes of its inputs and outputs, by path.

    `icenet.parity.align` has the axes of each kind. A user's class that overrides `__call__` is left out, because it
    may take other axes than the layer that it derives from.
    """
    known, found = _NATIVE_KINDS | _CALL_KINDS, {}
    for path, module in modules:
        kind = _known_kind(module, known)
        owner = str(getattr(type(module).__call__, "__module__", ""))  # without one, the module only holds arrays
        if kind and owner.partition(".")[0] in ("mlx", "icenet"):
            found[path] = kind
    return found


def counterpart_kinds(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    """Returns the kind of each module with other arrays in PyTorch, by path (`icenet.core.weights.counterparts`)."""
    known = ((path, _known_kind(module, _COUNTERPARTS)) for path, module in modules)
    return {path: kind for path, kind in known if kind}


def _known_kind(module: nn.Module, kinds: dict[type, str]) -> str | None:
    """Returns the kind that the class names, or that of the first class of the table, or None."""
    own: str | None = getattr(module, "layer_kind", None)
    return own or next((kind for layer, kind in kinds.items() if isinstance(module, layer)), None)
