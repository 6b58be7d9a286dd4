"""Activation functions, MLX."""

from __future__ import annotations

import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.nn.arrays import Array, on_cpu


def activation(name: str, x: Array) -> Array:
    """Applies an activation elementwise: gelu (exact), gelu_tanh (approximate), relu or silu."""
    if on_cpu():
        return _on_cpu(name, x)
    if name == "gelu":
        return nn.gelu(x)
    if name == "gelu_tanh":
        return nn.gelu_approx(x)
    if name == "silu":
        return nn.silu(x)
    return nn.relu(x)


def _on_cpu(name: str, x: Array) -> Array:
    """Applies an activation with the formulas of `mlx.nn`, which gives the same bits.

    `mlx.nn` compiles its functions. On a CPU this starts g++ (0.8 s for each function) and gains nothing.
    """
    if name == "gelu":
        return x * (1 + mx.erf(x / math.sqrt(2))) / 2
    if name == "gelu_tanh":
        return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "silu":
        return x * mx.sigmoid(x)
    return mx.maximum(x, 0)
