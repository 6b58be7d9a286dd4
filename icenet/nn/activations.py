"""Activation functions, MLX."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.nn as nn

from icenet.nn.arrays import Array


def activation(name: str, x: Array) -> Array:
    """Applies an activation elementwise: gelu (exact), gelu_tanh (approximate), relu or silu."""
    if name == "gelu":
        return nn.gelu(x)
    if name == "gelu_tanh":
        return nn.gelu_approx(x)
    if name == "silu":
        return nn.silu(x)
    return nn.relu(x)
