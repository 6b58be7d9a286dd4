"""Attention of one new token to a cache of fixed size, PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from icenet_torch.nn.arrays import Array, on_cpu
from icenet_torch.nn.attention import Mask


def has_cached_attention(q: Array, k: Array, v: Array) -> bool:
    """Returns whether `cached_attention` computes these queries: one for each row, not on the CPU."""
    return not on_cpu(q) and q.shape[2] == 1


def cached_attention(q: Array, keys: Array, values: Array, mask: Mask, scale: float | None = None) -> Array:
    """Attends to all tokens of a row.

    The heads of queries that share a head of keys are the queries of that head, so the keys and values are not
    repeated for them. PyTorch's fused kernels with a mask would do that.

    Args:
        q: Queries, `[B, H, 1, E]`.
        keys, values: `[B, K, S, E]`.
        mask: See `scaled_dot_product_attention`. It is the same for all heads.
        scale: Factor of the scores; None is 1 / sqrt(E).

    Returns:
        `[B, H, 1, E]` in the dtype of q.
    """
    batch, heads, _, size = q.shape
    groups = q.reshape(batch, keys.shape[1], -1, size)
    if isinstance(mask, torch.Tensor):
        mask = mask.expand(batch, 1, 1, -1).expand(batch, keys.shape[1], groups.shape[2], -1)
    out = F.scaled_dot_product_attention(
        groups, keys, values, attn_mask=None if isinstance(mask, str) else mask, scale=scale
    )
    return out.reshape(batch, heads, 1, size)
