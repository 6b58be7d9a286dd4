"""Linear layers and embeddings, PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from icenet_torch.nn.arrays import Array, cast_weight, product_dtype
from icenet_torch.nn.embedding import CheckedEmbedding


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

    def reset_parameters(self) -> None:
        """Does nothing: initial values come from `icenet.core.models.init`."""

    def forward(self, x: Array) -> Array:
        return linear(x, self.weight, self.bias)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Computes x W^T + b: x `[..., in]`, weight `[out, in]`, bias `[out]` to `[..., out]` in the dtype of x."""
    y, w = x.to(product_dtype(x)), cast_weight(weight, x)
    return F.linear(y, w, None if bias is None else cast_weight(bias, x)).to(x.dtype)


class Embedding(CheckedEmbedding):
    """A table of vectors: ids int `[...]` to `[..., D]`."""

    def reset_parameters(self) -> None:
        """Does nothing: initial values come from `icenet.core.models.init`."""

    def forward(self, ids: Array) -> Array:
        # as MLX, which takes integers of all sizes; PyTorch's function takes these two
        return super().forward(ids if ids.dtype in (torch.int32, torch.int64) else ids.long())

    def as_linear(self, x: Array) -> Array:
        """Returns logits `[..., V]` of x `[..., D]`, with the table as the weight of a linear layer."""
        return linear(x, self.weight)


class Bias(nn.Module):
    """A bias, x + b, in the dtype of x: that of a projection whose weight belongs to another layer."""

    layer_kind = "linear"

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Array) -> Array:
        return x + self.bias.to(x.dtype)
