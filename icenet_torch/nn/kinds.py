"""Layer kinds: the row of the table in `icenet.core.weights.layout` for each layer class of PyTorch."""

from __future__ import annotations

from torch import nn

_NATIVE_KINDS: dict[type, str] = {
    nn.Linear: "linear",
    nn.Embedding: "embedding",
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


def kind_of(module: nn.Module) -> str | None:
    """Returns the kind of a layer with parameters (see `icenet.core.weights.layout`), or None without parameters.

    A module class can name its kind in `layer_kind`. Other modules that hold arrays are of kind "plain".
    """
    own: str | None = getattr(module, "layer_kind", None)
    known = own or next((kind for layer, kind in _NATIVE_KINDS.items() if isinstance(module, layer)), None)
    holds_arrays = bool(module._parameters) or any(
        name not in module._non_persistent_buffers_set for name in module._buffers
    )
    return known or ("plain" if holds_arrays else None)
