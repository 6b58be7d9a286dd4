"""Linear layers and embeddings, MLX."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.nn import exact
from icenet.nn.arrays import Array, cast_weight, on_cpu, product_dtype
from icenet.nn.embedding import CheckedEmbedding


class Linear(nn.Linear):
    """A linear layer, x W^T + b, in the dtype of x.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output.
        bias: Whether the layer has a bias.
        init_scale: Factor of the weight's initial values (see `icenet.core.models.init`).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init_scale: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias)
        self.init_scale = init_scale

    def __call__(self, x: Array) -> Array:
        return linear(x, self.weight, self.get("bias"))


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Computes x W^T + b: x `[..., in]`, weight `[out, in]`, bias `[out]` to `[..., out]` in the dtype of x."""
    y, w = x.astype(product_dtype(x)), cast_weight(weight, x).T
    if bias is None:
        return (y @ w).astype(x.dtype)
    b = cast_weight(bias, x)
    y = exact.add_bias(y @ w, b) if on_cpu() else mx.addmm(b, y, w)
    return y.astype(x.dtype)


class Embedding(CheckedEmbedding):
    """A table of vectors: ids int `[...]` to `[..., D]`."""

    def as_linear(self, x: Array) -> Array:
        """Returns logits `[..., V]` of x `[..., D]`, with the table as the weight of a linear layer."""
        return linear(x, self.weight)


class Bias(nn.Module):
    """A bias, x + b, in the dtype of x: that of a projection whose weight belongs to another layer."""

    layer_kind = "linear"

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bias = mx.zeros((features,))

    def __call__(self, x: Array) -> Array:
        b = cast_weight(self.bias, x)
        return (exact.add_bias(x, b) if on_cpu() else x + b).astype(x.dtype)
