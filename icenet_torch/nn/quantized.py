"""Layers with quantized weights, PyTorch. The mirror is `icenet/nn/quantized.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from icenet.core.weights.packed import Quantization


def quantization_of(module: nn.Module) -> Quantization | None:
    """Returns how a layer is quantized; None if it is not."""
    return None


def is_quantizable(module: nn.Module) -> bool:
    """Returns whether the weight of a layer can be quantized."""
    return getattr(module, "can_quantize", type(module) is nn.Linear)


def quantize_layers(modules: Iterable[tuple[str, nn.Module]], layers: Mapping[str, Quantization]) -> set[str]:
    """Makes layers of a model quantized ones, in place. Their values are undefined until they are set.

    Args:
        modules: All modules of the model, by path.
        layers: The settings of each layer, by path.

    Returns:
        The paths of the layers that are quantized.
    """
    return set()
