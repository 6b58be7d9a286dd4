"""Scaled dot-product attention and its masks, MLX."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import TypeAlias

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array, on_cpu, product_dtype

Mask: TypeAlias = str | Array | None
"""None, "causal", bool (True where a query may attend), or float, which is added to the scores."""


def scaled_dot_product_attention(
    q: Array, k: Array, v: Array, mask: str | Array | None, scale: float | None = None, softcap: float | None = None
) -> Array:
    """Computes softmax(scale q k^T) v, with the fused kernel if there is no softcap.

    Args:
        q: Queries `[B, H, T, D]`.
        k: Keys `[B, K, S, D]`. Each of the K heads is shared by H / K heads of queries.
        v: Values `[B, K, S, D]`.
        mask: None, "causal", or an array that broadcasts to `[B, H, T, S]`: bool, True where a query may attend, or
            float, which is added to the scores. A causal mask is aligned to the end: the last query attends to the
            last key, also if T < S.
        scale: Factor of the scores; None is 1 / sqrt(D).
        softcap: Limit c of the scores s, which become c * tanh(s / c) (Gemma 2, 2024); None: no limit.

    Returns:
        `[B, H, T, D]` in the dtype of q.
    """
    dtype = product_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(mask, str) and q.shape[2] == 1:
        mask = None  # the last query attends to all keys; on a CPU, MLX makes a mask in each layer
    queries, keys, values = q.astype(dtype), k.astype(dtype), v.astype(dtype)
    if mask is not None and not isinstance(mask, str) and mask.dtype != mx.bool_:
        mask = mask.astype(dtype)
    if softcap is None:
        if isinstance(mask, str) and q.shape[2] > _CPU_BLOCK and on_cpu():
            return _causal_on_cpu(queries, keys, values, scale).astype(q.dtype)
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
        return out.astype(q.dtype)
    if isinstance(mask, str):
        columns = mx.arange(k.shape[2])
        mask = columns <= columns[-q.shape[2] :, None]
    groups = q.shape[1] // k.shape[1]
    keys, values = mx.repeat(keys, groups, axis=1), mx.repeat(values, groups, axis=1)
    scores = (queries @ keys.swapaxes(2, 3)).astype(mx.float32) * scale
    scores = softcap * mx.tanh(scores / softcap)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask
    return (mx.softmax(scores, axis=-1).astype(dtype) @ values).astype(q.dtype)


_CPU_BLOCK = 64
"""Queries that attend together on a CPU."""


def _causal_on_cpu(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Computes causal attention in blocks of queries, without the keys that none of a block attends to.

    MLX's CPU computes all scores, also those that the mask removes, and their exponentials take most of the time.
    Milliseconds forward and backward, one thread, blocks of 64 and all queries together: 23 and 35 (2 x 4 heads, 512
    queries of 32), 6.5 and 8.3 (4 x 2 heads, 256 of 32), 113 and 178 (8 heads, 1024 of 64).
    """
    length, before = q.shape[2], k.shape[2] - q.shape[2]
    blocks = []
    for start in range(0, length, _CPU_BLOCK):
        end = min(start + _CPU_BLOCK, length)
        seen = before + end
        arrays = q[:, :, start:end], k[:, :, :seen], v[:, :, :seen]
        blocks.append(mx.fast.scaled_dot_product_attention(*arrays, scale=scale, mask="causal"))
    return mx.concatenate(blocks, axis=2)


def biased_mask(mask: Mask, bias: Array) -> Array:
    """Returns a mask of `scaled_dot_product_attention` that adds a bias to the scores.

    Args:
        mask: None or bool, True where a query may attend.
        bias: Float, `[1, H, T, S]`.
    """
    assert not isinstance(mask, str)
    return bias if mask is None else mx.where(mask, bias, -mx.inf)


def by_distance(table: Array, length: int) -> Array:
    """Returns the entry of a table `[2 * L - 1]` for the distance from each query to each key, `[length, length]`."""
    columns = mx.arange(length)
    return table[columns - columns[:, None] + table.shape[0] // 2]


def rotate(x: Array, angles: Array, pairs: str) -> Array:
    """Rotates pairs of values of queries or keys by the angles of their positions (Su et al., 2021).

    Args:
        x: `[B, H, T, D]`.
        angles: Cosines, negative sines and sines, fp32 `[T, 3, R / 2]` or `[B, 1, T, 3, R / 2]`. The first R of D
            values are rotated.
        pairs: "half" for the pairs i and i + R / 2, "interleaved" for 2i and 2i + 1.
    """
    if on_cpu():
        return _rotate(pairs, x, angles)
    # one kernel instead of five, and heads of a token stay neighbours in memory: attention keeps the layout of the
    # queries, and joining its heads then needs no copy
    angles = angles[:, None] if angles.ndim == 3 else angles.swapaxes(1, 2)
    return _compiled_rotate(pairs)(x.swapaxes(1, 2), angles).swapaxes(1, 2)


def _rotate(pairs: str, x: Array, angles: Array) -> Array:
    """Rotates x `[..., D]` by angles `[..., 3, R / 2]`."""
    size = 2 * angles.shape[-1]
    # x cos + other sin, where `other` is the other value of the pair; a flip is a view
    if pairs == "interleaved":
        angles = angles.swapaxes(-1, -2)  # [..., R / 2, 3]
        y = x[..., :size].reshape(*x.shape[:-1], -1, 2)
        other, cosine, sines = y[..., ::-1], angles[..., :1], angles[..., 1:]
    else:
        y = x[..., :size].reshape(*x.shape[:-1], 2, -1)
        other, cosine, sines = y[..., ::-1, :], angles[..., :1, :], angles[..., 1:, :]
    rotated = (y.astype(mx.float32) * cosine + other.astype(mx.float32) * sines).astype(x.dtype)
    rotated = rotated.reshape(*x.shape[:-1], size)
    return rotated if size == x.shape[-1] else mx.concatenate([rotated, x[..., size:]], axis=-1)


@lru_cache
def _compiled_rotate(pairs: str) -> Callable[[Array, Array], Array]:
    compiled: Callable[[Array, Array], Array] = mx.compile(partial(_rotate, pairs))
    return compiled


def positions_and_masks(
    input_ids: Array, attention_mask: Array | None, causal: bool, windows: Iterable[int | None] = (None,)
) -> tuple[Array, dict[int | None, Mask]]:
    """Returns the positions of tokens in their rows, and masks of `scaled_dot_product_attention`.

    Args:
        input_ids: `[B, T]`.
        attention_mask: `[B, T]`, 0 or False for padding, or None. Positions are counted from the first token of each
            row that is not padding.
        causal: Whether a token attends to itself and to earlier tokens only.
        windows: Numbers of tokens that a token attends to; None for all.

    Returns:
        Positions, int32 `[T]` or `[B, T]`, and the mask of each window.
    """
    columns = mx.arange(input_ids.shape[1])
    if attention_mask is None:
        return columns, {window: make_attention_mask(None, columns, causal, window) for window in windows}
    attention_mask = attention_mask.astype(mx.bool_)
    counted = mx.cumsum(attention_mask.astype(mx.int32), axis=1)
    masks = {window: make_attention_mask(attention_mask, columns, causal, window) for window in windows}
    return mx.maximum(counted - 1, 0), masks


def make_attention_mask(
    attention_mask: Array | None, queries: Array, causal: bool, window: int | None = None
) -> Mask:
    """Returns the mask of `scaled_dot_product_attention` for some of S columns.

    A padding query attends to itself. A row without any key would be zero in PyTorch and NaN in MLX; the outputs of
    padding positions are ignored.

    Args:
        attention_mask: bool `[B, S]`, False for padding, or None without padding.
        queries: Columns of the queries, int `[T]`, or `[B, T]` if they differ between the rows.
        causal: Whether a query attends to its own and earlier columns only.
        window: Number of columns that a query attends to, its own included; None for all.
    """
    if attention_mask is None:
        if window is None or window >= queries.shape[-1]:
            return "causal" if causal else None
        attention_mask = mx.ones((1, queries.shape[-1]), mx.bool_)
    keys = mx.arange(attention_mask.shape[1])
    mask, queries = attention_mask[:, None, None, :], queries[..., None, :, None]
    if causal:
        mask = mask & (keys <= queries)
    if window is not None:
        mask = mask & (keys > queries - window)
    return mask | (keys == queries)
