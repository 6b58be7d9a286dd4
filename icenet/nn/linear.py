"""Linear layers and embeddings, MLX."""

from __future__ import annotations

import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.nn.arrays import Array, is_half, on_cpu


class Linear(nn.Linear):
    """x W^T + b in the dtype of x; the weights stay in theirs."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init_scale: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias)
        self.init_scale = init_scale

    def __call__(self, x: Array) -> Array:
        return linear(x, self.weight, self.get("bias"))


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x `[..., in]` times weight `[out, in]` transposed, plus bias `[out]`: `[..., out]` in x's dtype."""
    dtype = mx.float32 if is_half(x) and on_cpu() else x.dtype
    y, w = x.astype(dtype), weight.astype(x.dtype).astype(dtype).T
    if bias is None:
        return (y @ w).astype(x.dtype)
    b = bias.astype(x.dtype).astype(dtype)
    if not on_cpu():
        return mx.addmm(b, y, w).astype(x.dtype)
    # MLX's CPU adds a bias's gradient up term by term, 13 times less exactly than PyTorch at 8192 positions;
    # broadcast in two stages it is sqrt(N) sums of sqrt(N) terms
    positions = math.prod(x.shape[:-1])
    group = next((n for n in range(math.isqrt(positions), 0, -1) if positions % n == 0), 1)
    grouped = (y @ w).reshape(-1, group, b.shape[0]) + mx.broadcast_to(b, (positions // group, 1, b.shape[0]))
    return grouped.reshape(*x.shape[:-1], b.shape[0]).astype(x.dtype)


class Embedding(nn.Embedding):
    """Rows of a table: ids int `[...]` to `[..., D]`."""

    def as_linear(self, x: Array) -> Array:
        """Logits `[..., rows]` of x `[..., D]`: the table is the weight of an output layer without bias."""
        return linear(x, self.weight)
