"""Activation functions, PyTorch."""

from __future__ import annotations

import torch.nn.functional as F

from icenet.core.nn.activation import check_activation
from icenet_torch.nn.arrays import Array


def activation(name: str, x: Array) -> Array:
    """Applies an activation elementwise.

    Args:
        name: gelu (exact), gelu_tanh (approximate), relu or silu.
        x: `[...]`, of any floating dtype.

    Returns:
        `[...]` in the dtype of x.

    Raises:
        UsageError: The name is unknown.
    """
    check_activation(name)
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "silu":
        return F.silu(x)
    return F.relu(x)


def gated_activation(name: str, gate: Array, x: Array) -> Array:
    """Returns activation(gate) * x.

    Args:
        name: As in `activation`.
        gate, x: `[...]`, of one shape and dtype, which the result has too.
    """
    return activation(name, gate) * x
