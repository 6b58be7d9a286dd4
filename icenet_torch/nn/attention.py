"""Scaled dot-product attention and its masks, PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from icenet_torch.nn.arrays import Array, is_half, on_cpu


def scaled_dot_product_attention(q: Array, k: Array, v: Array, mask: str | Array | None) -> Array:
    """Scaled dot-product attention: softmax(q k^T / sqrt(D)) v, fused.

    q `[B, H, T, D]`, k and v `[B, H, S, D]` give `[B, H, T, D]`. The mask is None, "causal" (the last query
    sees the last key, also where T < S) or bool, True where a query may look, broadcast to `[B, H, T, S]`.
    """
    dtype = torch.float32 if is_half(q) and on_cpu(q) else q.dtype
    queries, keys = q.shape[-2], k.shape[-2]
    causal = isinstance(mask, str) and queries == keys
    if isinstance(mask, str):
        # PyTorch's is_causal lets the first query see the first key only: spell the mask out where T < S
        positions = torch.arange(keys, device=q.device)
        mask = None if causal or queries == 1 else positions <= positions[-queries:, None]
    out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, is_causal=causal)
    return out.to(q.dtype)


def make_attention_mask(attention_mask: Array | None, length: int, causal: bool) -> str | Array | None:
    """The mask for `length` queries that stand at the end of the keys.

    `attention_mask` is bool `[B, S]`, False for padding, or None where there is none. A padding query sees itself:
    a row without any key is zero in PyTorch and not a number in MLX, and nobody reads it.
    """
    if attention_mask is None:
        return "causal" if causal else None
    keys = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    queries = keys[-length:, None]
    pattern = attention_mask[:, None, None, :]
    if causal:
        pattern = pattern & (keys <= queries)
    return pattern | (keys == queries)
