"""Linear layers and embeddings, PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from icenet_torch.nn.arrays import Array, is_half, on_cpu


class Linear(nn.Linear):
    """x W^T + b in the dtype of x; the weights stay in theirs."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init_scale: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias)
        self.init_scale = init_scale

    def reset_parameters(self) -> None:
        """Nothing: initial values come from `icenet.core.models.init`."""

    def forward(self, x: Array) -> Array:
        return linear(x, self.weight, self.bias)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x `[..., in]` times weight `[out, in]` transposed, plus bias `[out]`: `[..., out]` in x's dtype."""
    dtype = torch.float32 if is_half(x) and on_cpu(x) else x.dtype
    y, w = x.to(dtype), weight.to(x.dtype).to(dtype)
    y = F.linear(y, w, None if bias is None else bias.to(x.dtype).to(dtype))
    return y.to(x.dtype)


class Embedding(nn.Embedding):
    """Rows of a table: ids int `[...]` to `[..., D]`."""

    def reset_parameters(self) -> None:
        """Nothing: initial values come from `icenet.core.models.init`."""

    def as_linear(self, x: Array) -> Array:
        """Logits `[..., rows]` of x `[..., D]`: the table is the weight of an output layer without bias."""
        return linear(x, self.weight)
