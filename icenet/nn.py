"""Layers and functions of the MLX models, wherever the two frameworks differ in meaning.

Shapes: B batch, T positions, D width, H heads. The mirror is `icenet_torch/nn.py`.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

Array: TypeAlias = mx.array


_NATIVE_KINDS: dict[type, str] = {
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    nn.LayerNorm: "layer_norm",
}


def kind_of(module: nn.Module) -> str | None:
    """The kind of a layer that holds parameters, ours or the framework's own (see `icenet.core.layout`)."""
    return next((kind for layer, kind in _NATIVE_KINDS.items() if isinstance(module, layer)), None)


def on_cpu() -> bool:
    """True where products in half precision are slow and are better done in fp32 (20x on x86)."""
    return mx.default_device().type == mx.DeviceType.cpu


def is_half(x: Array) -> bool:
    return x.dtype in (mx.float16, mx.bfloat16)


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


class LayerNorm(nn.LayerNorm):
    """Layer norm (Ba et al., 2016) over the last axis, its statistics in fp32."""

    def __init__(self, dims: int, eps: float = 1e-5) -> None:
        super().__init__(dims, eps)

    def __call__(self, x: Array) -> Array:
        return mx.fast.layer_norm(x.astype(self.weight.dtype), self.weight, self.bias, self.eps).astype(x.dtype)


class Dropout(nn.Module):
    """Zeroes each value with probability p in training and scales the rest by 1 / (1 - p).

    With a key (see `BaseModel.seed_dropout`) the mask is a pure function of it, the same on both backends;
    without one the framework's own generator draws it.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self._key: Array | None = None

    def __call__(self, x: Array) -> Array:
        if not self.training or self.p == 0:
            return x
        keep = dropout_mask(x.shape, self.p, self._key)
        return mx.where(keep, x * (1 / (1 - self.p)), mx.zeros((), x.dtype))


def dropout_mask(shape: tuple[int, ...], p: float, key: Array | None) -> Array:
    """A mask, bool, that is True with probability 1 - p."""
    if key is None:
        return mx.random.bernoulli(1 - p, shape)
    n = math.prod(shape)
    words = mx.random.split(key, (n + 1) // 2).reshape(-1)[:n]  # the public way to MLX's random bits
    return (words >= mx.array(dropout_threshold(p), mx.uint32)).reshape(shape)


def dropout_threshold(p: float) -> int:
    """The least 32-bit word that keeps a value."""
    return min(round(p * 2**32), 2**32 - 1)


def random_uniform(keys: Array, n: int) -> Array:
    """Uniform variates in [0, 1), float32 `[..., n]`, under each of the keys uint32 `[..., 2]`."""
    draw = mx.vmap(lambda key: mx.random.uniform(shape=(n,), key=key))
    return draw(keys.reshape(-1, 2)).reshape(*keys.shape[:-1], n)


def activation(name: str, x: Array) -> Array:
    """gelu (exact), gelu_tanh (its approximation), relu or silu, elementwise."""
    if name == "gelu":
        return nn.gelu(x)
    if name == "gelu_tanh":
        return nn.gelu_approx(x)
    if name == "silu":
        return nn.silu(x)
    return nn.relu(x)


def attention(q: Array, k: Array, v: Array, mask: str | Array | None) -> Array:
    """Scaled dot-product attention: softmax(q k^T / sqrt(D)) v, fused.

    q `[B, H, T, D]`, k and v `[B, H, S, D]` give `[B, H, T, D]`. The mask is None, "causal" (the last query
    sees the last key, also where T < S) or bool, True where a query may look, broadcast to `[B, H, T, S]`.
    """
    dtype = mx.float32 if is_half(q) and on_cpu() else q.dtype
    scale = q.shape[-1] ** -0.5
    out = mx.fast.scaled_dot_product_attention(
        q.astype(dtype), k.astype(dtype), v.astype(dtype), scale=scale, mask=mask
    )
    return out.astype(q.dtype)


def attention_pattern(visible: Array | None, length: int, causal: bool) -> str | Array | None:
    """The mask for `length` queries that stand at the end of the keys.

    `visible` is bool `[B, S]`, False for padding, or None where there is none. A padding query sees itself:
    a row without any key is zero in PyTorch and not a number in MLX, and nobody reads it.
    """
    if visible is None:
        return "causal" if causal else None
    keys = mx.arange(visible.shape[1])
    queries = keys[-length:, None]
    pattern = visible[:, None, None, :]
    if causal:
        pattern = pattern & (keys <= queries)
    return pattern | (keys == queries)


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """The mean cross-entropy in nats, fp32, and the number of labels counted.

    logits `[..., V]`; labels int `[...]`, where a negative label counts for nothing. The mean is taken twice,
    the second time of what is left over: a single sum of a thousand losses is off by several roundings.
    """
    counted = labels >= 0
    logits = logits.astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, mx.where(counted, labels, 0))
    count = counted.sum()
    share = counted / mx.maximum(count, 1)
    rough = mx.stop_gradient((losses * share).sum())
    return rough + ((losses - rough) * share).sum(), count


def global_norm(gradients: list[Array]) -> Array:
    """The Euclidean norm of all gradients together, fp32.

    Summed row by row first: one long sum in fp32 is off by 1e-5 over 1e7 values in MLX.
    """
    rows = [mx.square(gradient.astype(mx.float32)).sum(axis=-1) for gradient in gradients]
    return mx.sqrt(sum((row.sum() for row in rows), mx.zeros(())))


def checkpoint(block: nn.Module, *inputs: object) -> Array:
    """The block's output, its activations computed anew in the backward pass instead of kept."""
    return nn.utils.checkpoint(block)(*inputs)
