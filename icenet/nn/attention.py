"""Scaled dot-product attention and its masks, MLX."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array, product_dtype


def scaled_dot_product_attention(q: Array, k: Array, v: Array, mask: str | Array | None) -> Array:
    """Computes softmax(q k^T / sqrt(D)) v with the fused kernel.

    Args:
        q: Queries `[B, H, T, D]`.
        k: Keys `[B, H, S, D]`.
        v: Values `[B, H, S, D]`.
        mask: None, "causal", or bool that broadcasts to `[B, H, T, S]`, True where a query may attend. A causal mask
            is aligned to the end: the last query attends to the last key, also if T < S.

    Returns:
        `[B, H, T, D]` in the dtype of q.
    """
    dtype = product_dtype(q)
    scale = q.shape[-1] ** -0.5
    out = mx.fast.scaled_dot_product_attention(
        q.astype(dtype), k.astype(dtype), v.astype(dtype), scale=scale, mask=mask
    )
    return out.astype(q.dtype)


def positions_and_mask(
    input_ids: Array, attention_mask: Array | None, causal: bool
) -> tuple[Array, str | Array | None]:
    """Returns the positions of tokens in their rows, and the mask of `scaled_dot_product_attention`.

    Args:
        input_ids: `[B, T]`.
        attention_mask: `[B, T]`, 0 or False for padding, or None. Positions are counted from the first token of each
            row that is not padding.
        causal: Whether a token attends to itself and to earlier tokens only.

    Returns:
        Positions, int32 `[T]` or `[B, T]`, and the mask.
    """
    columns = mx.arange(input_ids.shape[1])
    if attention_mask is None:
        return columns, make_attention_mask(None, columns, causal)
    attention_mask = attention_mask.astype(mx.bool_)
    counted = mx.cumsum(attention_mask.astype(mx.int32), axis=1)
    return mx.maximum(counted - 1, 0), make_attention_mask(attention_mask, columns, causal)


def make_attention_mask(attention_mask: Array | None, queries: Array, causal: bool) -> str | Array | None:
    """Returns the mask of `scaled_dot_product_attention` for some of S columns.

    A padding query attends to itself. A row without any key would be zero in PyTorch and NaN in MLX; the outputs of
    padding positions are ignored.

    Args:
        attention_mask: bool `[B, S]`, False for padding, or None without padding.
        queries: Columns of the queries, int `[T]`.
        causal: Whether a query attends to its own and earlier columns only.
    """
    if attention_mask is None:
        return "causal" if causal else None
    keys = mx.arange(attention_mask.shape[1])
    mask = attention_mask[:, None, None, :]
    if causal:
        mask = mask & (keys <= queries[:, None])
    return mask | (keys == queries[:, None])
