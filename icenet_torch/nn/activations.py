"""Activation functions, PyTorch."""

from __future__ import annotations

import torch.nn.functional as F

from icenet_torch.nn.arrays import Array


def activation(name: str, x: Array) -> Array:
    """Applies an activation elementwise: gelu (exact), gelu_tanh (approximate), relu or silu."""
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "silu":
        return F.silu(x)
    return F.relu(x)


def gated_activation(name: str, gate: Array, x: Array) -> Array:
    """Returns activation(gate) * x."""
    return activation(name, gate) * x
