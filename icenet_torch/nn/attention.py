"""Scaled dot-product attention and its masks, PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from icenet_torch.nn.arrays import Array, is_half, product_dtype
from icenet_torch.nn.cached_attention import has_triton

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
    queries, keys, values = (array if array.dtype == dtype else array.to(dtype) for array in (q, k, v))
    is_causal = isinstance(mask, str)
    if isinstance(mask, str):
        mask = None
        if softcap is None and _has_aligned_kernel(queries, keys, values):
            return torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values, 0.0, True, scale=scale)[
                0
            ]
        if q.shape[2] != k.shape[2] or softcap is not None:  # PyTorch aligns is_causal to the start
            is_causal = False
            columns = torch.arange(k.shape[2], device=q.device)
            mask = None if q.shape[2] == 1 else columns <= columns[-q.shape[2] :, None]
    elif mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    if softcap is None:
        is_grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
        )
        return out.to(q.dtype)
    groups = q.shape[1] // k.shape[1]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = (queries @ keys.transpose(2, 3)).to(torch.promote_types(dtype, torch.float32)) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if isinstance(mask, torch.Tensor):
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(dim=-1).to(dtype) @ values).to(q.dtype)


def _has_aligned_kernel(q: Array, k: Array, v: Array) -> bool:
    """Returns whether the flash kernel, whose causal mask is aligned to the end, can read some queries and more keys.

    With a mask as an array, PyTorch takes a slower kernel. `torch.nn.attention.bias.causal_lower_right` calls the
    same kernel; importing it takes a second.
    """
    if not q.is_cuda or not 1 < q.shape[2] < k.shape[2] or q.shape[3] % 8 or torch.compiler.is_compiling():
        return False
    return can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, q.shape[1] != k.shape[1]))


def biased_mask(mask: Mask, bias: Array) -> Array:
    """Returns a mask of `scaled_dot_product_attention` that adds a bias to the scores.

    Args:
        mask: None or bool, True where a query may attend.
        bias: Float, `[1, H, T, S]`.
    """
    assert not isinstance(mask, str)
    return bias if mask is None else torch.where(mask, bias, -torch.inf)


def by_distance(table: Array, length: int) -> Array:
    """Returns the entry of a table `[2 * L - 1]` for the distance from each query to each key, `[length, length]`."""
    columns = torch.arange(length, device=table.device)
    return table[columns - columns[:, None] + table.shape[0] // 2]


def rotate(x: Array, angles: Array, pairs: str) -> Array:
    """Rotates pairs of values of queries or keys by the angles of their positions (Su et al., 2021).

    Args:
        x: `[B, H, T, D]`.
        angles: Cosines, negative sines and sines, fp32 `[T, 3, R / 2]` or `[B, 1, T, 3, R / 2]`. The first R of D
            values are rotated.
        pairs: "half" for the pairs i and i + R / 2, "interleaved" for 2i and 2i + 1.
    """
    if _has_kernel(x):
        from icenet_torch.nn import kernels

        return kernels.rotate(x, angles, pairs)
    size = 2 * angles.shape[-1]
    y = x if size == x.shape[-1] else x[..., :size]
    y = y.float() if is_half(x) else y
    # x cos + other sin, where `other` is the other value of the pair
    if pairs == "interleaved":
        angles = angles.transpose(-1, -2)  # [..., R / 2, 3]
        y = y.reshape(*y.shape[:-1], -1, 2)
        rotated = y * angles[..., :1] + y.flip(-1) * angles[..., 1:]
    else:
        y = y.reshape(*y.shape[:-1], 2, -1)
        rotated = y * angles[..., :1, :] + y.flip(-2) * angles[..., 1:, :]
    rotated = rotated.reshape(*x.shape[:-1], size)
    rotated = rotated.to(x.dtype) if is_half(x) else rotated
    return rotated if size == x.shape[-1] else torch.cat([rotated, x[..., size:]], dim=-1)


def _has_kernel(x: Array) -> bool:
    """Returns whether a kernel without gradients can rotate x: on CUDA, in inference."""
    is_inference = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and type(x) is torch.Tensor
    return is_inference and x.is_cuda and x.dtype != torch.float64 and has_triton()


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
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    if attention_mask is None:
        return columns, {window: make_attention_mask(None, columns, causal, window) for window in windows}
    attention_mask = attention_mask.to(torch.bool)
    counted = torch.cumsum(attention_mask.to(torch.int32), dim=1)
    masks = {window: make_attention_mask(attention_mask, columns, causal, window) for window in windows}
    return torch.clamp(counted - 1, min=0), masks


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
        attention_mask = torch.ones((1, queries.shape[-1]), dtype=torch.bool, device=queries.device)
    keys = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    mask, queries = attention_mask[:, None, None, :], queries[..., None, :, None]
    if causal:
        mask = mask & (keys <= queries)
    if window is not None:
        mask = mask & (keys > queries - window)
    return mask | (keys == queries)
