"""Triton kernels of attention to a cache, and of rotary positions. MLX's is in `icenet/nn/cached_attention.py`."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from icenet.core.config.transformer_plan import AttentionPlan
from icenet_torch.nn.kernels.common import can_overlap

COLUMNS = 64
"""Number of columns of a cache that a program reads at a time."""
COLUMNS_OF_A_PART = 1024
"""Length of a buffer above which several programs share the columns of a head."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    padding: Tensor | None,
    angles: Tensor | None,
    plan: AttentionPlan,
) -> Tensor:
    """Computes `icenet_torch.nn.cached_attention.cached_attention`, which has the same arguments."""
    batch, heads, _, size = q.shape
    columns = keys.shape[2]
    parts = triton.cdiv(columns, COLUMNS_OF_A_PART)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty((batch, heads, 1, size), dtype=q.dtype, device=q.device)
    partial = out if parts == 1 else torch.empty((batch, heads, parts, size + 2), device=q.device)
    overlaps = can_overlap(q.device)
    launch = {"launch_pdl": True} if overlaps else {}
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        _attend[(heads, batch, parts)](
            *(q, k, v, keys, values, position),
            position if padding is None else padding,
            position if angles is None else angles.contiguous(),
            partial,
            *(x.stride(axis) for x in (q, k, v) for axis in (0, 1)),
            size**-0.5 if plan.scale is None else plan.scale,
            plan.softcap or 1.0,
            columns,
            HEADS=heads,
            KV_HEADS=keys.shape[1],
            E=size,
            WIDTH=triton.next_power_of_2(size),
            SIZE=0 if angles is None else 2 * angles.shape[-1],
            NEIGHBOURS=plan.rotary_pairs == "interleaved",
            ANGLES_PER_ROW=angles is not None and angles.shape[0] > 1,
            PER_ROW=position.shape[0] > 1,
            PADDED=padding is not None,
            WINDOW=plan.window or 0,
            CAPPED=plan.softcap is not None,
            PARTS=parts,
            COLUMNS=COLUMNS,
            OVERLAPS=overlaps,
            **launch,
        )
        if parts > 1:
            width = triton.next_power_of_2(size)
            _join_parts[(batch * heads,)](partial, out, E=size, WIDTH=width, PARTS=parts, OVERLAPS=overlaps, **launch)
    return out


def rotate(x: Tensor, angles: Tensor, pairs: str) -> Tensor:
    """Computes `icenet_torch.nn.rotate` in one kernel instead of six, four of them over fp32 values.

    The heads of a token are neighbours in the result, which attention then returns in this layout.
    """
    batch, heads, length, size = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty((batch, length, heads, size), dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _rotate[(length, batch)](
            *(x, angles.contiguous(), out),
            *(x.stride(axis) for axis in (0, 1, 2)),
            HEADS=heads,
            ROWS=triton.next_power_of_2(heads),
            E=size,
            WIDTH=triton.next_power_of_2(size),
            SIZE=2 * angles.shape[-1],
            NEIGHBOURS=pairs == "interleaved",
            ANGLES_PER_ROW=angles.ndim > 3 and angles.shape[0] > 1,
        )
    return out.transpose(1, 2)


@triton.jit
def _rotated(x, e, angle, E: tl.constexpr, SIZE: tl.constexpr, NEIGHBOURS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns a head rotated as `icenet_torch.nn.rotate` does, fp32. Its first SIZE values are rotated."""
    value = tl.load(x + e, mask=e < E, other=0.0).to(tl.float32)
    if SIZE > 0:
        half: tl.constexpr = SIZE // 2
        turns = e < SIZE
        if NEIGHBOURS:
            pair = e // 2
            is_first = e % 2 == 0
            other = e ^ 1
        else:
            pair = e % half
            is_first = e < half
            other = tl.where(is_first, e + half, e - half)
        cosine = tl.load(angle + pair, mask=turns, other=1.0)
        sine = tl.load(angle + tl.where(is_first, half, SIZE) + pair, mask=turns, other=0.0)
        partner = tl.load(x + other, mask=turns, other=0.0).to(tl.float32)
        rotated = (value * cosine + partner * sine).to(x.dtype.element_ty).to(tl.float32)
        value = tl.where(turns, rotated, value)
    return value


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    x,
    angles,
    out,
    x_row,
    x_head,
    x_token,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    ANGLES_PER_ROW: tl.constexpr,
):
    """All heads of a token, see `_rotated`."""
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = tl.num_programs(0)
    half: tl.constexpr = SIZE // 2
    head, e = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (head < HEADS) & (e < E)
    turns = e < SIZE
    if NEIGHBOURS:
        pair = e // 2
        is_first = e % 2 == 0
        other = e ^ 1
    else:
        pair = e % half
        is_first = e < half
        other = tl.where(is_first, e + half, e - half)
    angle = angles + (row * length + token if ANGLES_PER_ROW else token) * 3 * half
    cosine = tl.load(angle + pair, mask=turns, other=1.0)
    sine = tl.load(angle + tl.where(is_first, half, SIZE) + pair, mask=turns, other=0.0)
    start = x + row * x_row + token * x_token + head * x_head
    value = tl.load(start + e, mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(start + other, mask=inside & turns, other=0.0).to(tl.float32)
    rotated = (value * cosine + partner * sine).to(out.dtype.element_ty)
    at = out + ((row * length + token) * HEADS + head) * E + e
    tl.store(at, rotated, mask=inside)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    keys,
    values,
    position,
    padding,
    angles,
    out,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    scale,
    softcap,
    columns,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    ANGLES_PER_ROW: tl.constexpr,
    PER_ROW: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One head of queries of one row, over a part of the columns. The first part of a head stores the new one."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head, part = tl.program_id(0), tl.program_id(2)
    row = tl.program_id(1).to(tl.int64)
    kv_head = head // (HEADS // KV_HEADS)
    e = tl.arange(0, WIDTH)
    inside = e < E
    last = tl.load(position + row) if PER_ROW else tl.load(position)
    first = tl.load(padding + row) if PADDED else last * 0
    if WINDOW > 0:
        first = tl.maximum(first, last - WINDOW + 1)
    share = tl.cdiv(tl.maximum(last - first, 0), PARTS)
    begin = first + part * share
    end = tl.minimum(begin + share, last)

    angle = angles + row * 3 * (SIZE // 2) if ANGLES_PER_ROW else angles
    query = _rotated(q + row * q_row + head * q_head, e, angle, E, SIZE, NEIGHBOURS) * scale
    buffer = (row * KV_HEADS + kv_head) * columns * E
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    sums = tl.zeros((WIDTH,), tl.float32)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        valid = column < end
        at = buffer + column[:, None] * E + e[None, :]
        both = valid[:, None] & inside[None, :]
        score = tl.sum(query[None, :] * tl.load(keys + at, mask=both, other=0.0).to(tl.float32), axis=1)
        if CAPPED:
            score = softcap * (1 - 2 / (tl.exp(2 * score / softcap) + 1))  # tanh
        score = tl.where(valid, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=0))
        keep = tl.exp(top - higher)
        weight = tl.exp(score - higher)
        value = tl.load(values + at, mask=both, other=0.0).to(tl.float32)
        sums = sums * keep + tl.sum(weight[:, None] * value, axis=0)
        total = total * keep + tl.sum(weight, axis=0)
        top = higher
    if part == 0:
        key = _rotated(k + row * k_row + kv_head * k_head, e, angle, E, SIZE, NEIGHBOURS)
        value = tl.load(v + row * v_row + kv_head * v_head + e, mask=inside, other=0.0)
        score = tl.sum(query * key, axis=0)
        if CAPPED:
            score = softcap * (1 - 2 / (tl.exp(2 * score / softcap) + 1))
        higher = tl.maximum(top, score)
        keep = tl.exp(top - higher)
        weight = tl.exp(score - higher)
        sums = sums * keep + weight * value.to(tl.float32)
        total = total * keep + weight
        top = higher
        if head % (HEADS // KV_HEADS) == 0:
            at = buffer + last.to(tl.int64) * E + e
            tl.store(keys + at, key.to(keys.dtype.element_ty), mask=inside)
            tl.store(values + at, value, mask=inside)
    place = (row * HEADS + head) * PARTS + part
    if PARTS == 1:
        tl.store(out + place * E + e, (sums / total).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + place * (E + 2) + e, sums, mask=inside)
        tl.store(out + place * (E + 2) + E, total)
        tl.store(out + place * (E + 2) + E + 1, top)


@triton.jit
def _join_parts(  # type: ignore[no-untyped-def]
    partial, out, E: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, OVERLAPS: tl.constexpr
):
    """The parts of a head: sums `[E]`, their total weight and their highest score, fp32."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, WIDTH)
    top = tl.full((), float("-inf"), tl.float32)
    for part in range(PARTS):
        top = tl.maximum(top, tl.load(partial + (place * PARTS + part) * (E + 2) + E + 1))
    total = tl.full((), 0.0, tl.float32)
    sums = tl.zeros((WIDTH,), tl.float32)
    for part in range(PARTS):
        at = partial + (place * PARTS + part) * (E + 2)
        weight = tl.exp(tl.load(at + E + 1) - top)
        total += tl.load(at + E) * weight
        sums += tl.load(at + e, mask=e < E, other=0.0) * weight
    tl.store(out + place * E + e, (sums / total).to(out.dtype.element_ty), mask=e < E)
