"""Scaled dot-product attention and its masks, MLX."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array, is_half, on_cpu


def scaled_dot_product_attention(q: Array, k: Array, v: Array, mask: str | Array | None) -> Array:
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


def make_attention_mask(attention_mask: Array | None, length: int, causal: bool) -> str | Array | None:
    """The mask for `length` queries that stand at the end of the keys.

    `attention_mask` is bool `[B, S]`, False for padding, or None where there is none. A padding query sees itself:
    a row without any key is zero in PyTorch and not a number in MLX, and nobody reads it.
    """
    if attention_mask is None:
        return "causal" if causal else None
    keys = mx.arange(attention_mask.shape[1])
    queries = keys[-length:, None]
    pattern = attention_mask[:, None, None, :]
    if causal:
        pattern = pattern & (keys <= queries)
    return pattern | (keys == queries)
