"""Scaled dot-product attention and its masks, PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from icenet_torch.nn.arrays import Array, product_dtype


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
    is_causal = False
    if isinstance(mask, str):
        queries, keys = q.shape[-2], k.shape[-2]
        if queries == keys:
            mask, is_causal = None, True
        else:  # PyTorch aligns is_causal to the start, so T < S needs an explicit mask
            positions = torch.arange(keys, device=q.device)
            mask = None if queries == 1 else positions <= positions[-queries:, None]
    out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, is_causal=is_causal)
    return out.to(q.dtype)


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
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    if attention_mask is None:
        return columns, make_attention_mask(None, columns, causal)
    attention_mask = attention_mask.to(torch.bool)
    counted = torch.cumsum(attention_mask.to(torch.int32), dim=1)
    return torch.clamp(counted - 1, min=0), make_attention_mask(attention_mask, columns, causal)


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
    keys = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    mask = attention_mask[:, None, None, :]
    if causal:
        mask = mask & (keys <= queries[:, None])
    return mask | (keys == queries[:, None])
