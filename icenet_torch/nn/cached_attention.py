"""Attention of one new token to a cache of fixed size, PyTorch.

PyTorch's fused kernels read the whole buffer with a mask, need their own kernels to store keys and values and to
rotate, and repeat the keys for the queries that share them. The Triton kernel does all this at once, and reads only
the columns that have tokens.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

from icenet.core.config.transformer_plan import AttentionPlan
from icenet_torch.nn.arrays import Array

LARGEST_HEAD = 256


def has_cached_attention(buffer: Array, columns: int) -> bool:
    """Returns whether `cached_attention` can read a buffer: for one query of each row, on CUDA and with Triton.

    Args:
        buffer: Keys, `[B, K, S, E]`.
        columns: Number of queries of each row.
    """
    return columns == 1 and buffer.shape[-1] <= LARGEST_HEAD and buffer.is_cuda and has_triton()


def cached_attention(
    q: Array,
    k: Array,
    v: Array,
    keys: Array,
    values: Array,
    position: Array,
    padding: Array | None,
    angles: Array | None,
    plan: AttentionPlan,
) -> Array:
    """Stores the keys and values of one token of each row in the buffers, and attends to all tokens of the row.

    Queries and keys are rotated before.

    Args:
        q: Queries, `[B, H, 1, E]`.
        k, v: Keys and values of the tokens, `[B, K, 1, E]`.
        keys, values: Buffers, `[B, K, S, E]`, contiguous. They are written to.
        position: Column of the new token, int32 `[1]` or `[B]`.
        padding: Number of columns of padding on the left of each row, int32 `[B]`; None without padding.
        angles: See `rotate`; None without rotary positions.
        plan: Its scale, softcap, window and pairs of rotary positions are used.

    Returns:
        `[B, H, 1, E]` in the dtype of q.
    """
    from icenet_torch.nn import kernels

    return kernels.attend(q, k, v, keys, values, position, padding, angles, plan)


def joined_attention(
    qkv: Array,
    keys: Array,
    values: Array,
    position: Array,
    padding: Array | None,
    angles: Array | None,
    plan: AttentionPlan,
) -> Array:
    """Computes `cached_attention` of queries, keys and values that are side by side.

    Args:
        qkv: Queries, keys and values of the tokens, `[B, 1, (H + 2 K) E]`.
        keys, values, position, padding, angles, plan: See `cached_attention`.

    Returns:
        `[B, 1, H * E]` in the dtype of qkv.
    """
    batch, kv_heads, _, size = keys.shape
    heads = qkv.shape[-1] // size - 2 * kv_heads
    q, k, v = qkv.reshape(batch, -1, 1, size).split([heads, kv_heads, kv_heads], dim=1)
    return cached_attention(q, k, v, keys, values, position, padding, angles, plan).reshape(batch, 1, -1)


@lru_cache
def has_triton() -> bool:
    """Returns whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
