"""Layer kinds: the row of the table in `icenet.core.weights.layout` for each layer class of PyTorch."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

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
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.BatchNorm3d: "batch_norm",
}

# Layers without parameters, or whose parameters have no kind, that define the axes of their inputs and outputs.
_CALL_KINDS: dict[type, str] = {
    nn.InstanceNorm1d: "instance_norm",
    nn.InstanceNorm2d: "instance_norm",
    nn.InstanceNorm3d: "instance_norm",
    nn.MaxPool1d: "pool",
    nn.MaxPool2d: "pool",
    nn.MaxPool3d: "pool",
    nn.AvgPool1d: "pool",
    nn.AvgPool2d: "pool",
    nn.AvgPool3d: "pool",
    nn.AdaptiveAvgPool1d: "pool",
    nn.AdaptiveAvgPool2d: "pool",
    nn.AdaptiveAvgPool3d: "pool",
    nn.AdaptiveMaxPool1d: "pool",
    nn.AdaptiveMaxPool2d: "pool",
    nn.AdaptiveMaxPool3d: "pool",
    nn.Upsample: "upsample",
    nn.MultiheadAttention: "attention",
    nn.LSTM: "native_recurrent",
    nn.GRU: "native_recurrent",
    nn.RNN: "native_recurrent",
}


def kind_of(module: nn.Module) -> str | None:
    """Returns the kind of a layer with parameters (see `icenet.core.weights.layout`), or None without parameters.

    A module class can name its kind in `layer_kind`. Other modules that hold arrays are of kind "plain".
    """
    known = _known_kind(module, _NATIVE_KINDS)
    holds_arrays = bool(module._parameters) or any(
        name not in module._non_persistent_buffers_set for name in module._buffers
    )
    return known or ("plain" if holds_arrays else None)


def call_kinds(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    """Returns the kind of each module whose class defines the axes of its inputs and outputs, by path.

    `icenet.parity.align` has the axes of each kind. A user's class that overrides `forward` is left out, because it
    may take other axes than the layer that it derives from.
    """
    known, found = _NATIVE_KINDS | _CALL_KINDS, {}
    for path, module in modules:
        kind = _known_kind(module, known)
        if kind and type(module).forward.__module__.partition(".")[0] in ("torch", "icenet_torch"):
            found[path] = kind
    return found


def transposed_weights(modules: Iterable[tuple[str, nn.Module]]) -> set[str]:
    """Returns the paths of the weights of linear layers with the axes (in, out): `Conv1D` of Transformers (GPT-2)."""
    return {
        f"{path}.weight" if path else "weight"
        for path, module in modules
        if any((base.__module__, base.__name__) == _CONV1D for base in type(module).__mro__)
    }


_CONV1D = ("transformers.pytorch_utils", "Conv1D")


def _known_kind(module: nn.Module, kinds: dict[type, str]) -> str | None:
    """Returns the kind that the class names, or that of the first class of the table, or None."""
    own: str | None = getattr(module, "layer_kind", None)
    return own or next((kind for layer, kind in kinds.items() if isinstance(module, layer)), None)
