"""Triton kernels for NVIDIA GPUs: dropout masks, the loss and its gradient, and attention to a cache.

MLX draws threefry numbers itself, and has its kernel for attention in `icenet/nn/cached_attention.py`.

The module is imported only on a GPU and with Triton, which PyTorch's CUDA builds include.
"""

from __future__ import annotations

import contextlib
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from icenet.core.config.transformer_plan import AttentionPlan

BLOCK = 1024
CROSS_ENTROPY_BLOCK, CROSS_ENTROPY_WARPS = 8192, 32
"""Logits that a program reads at a time, and its warps: so many that the rows in work fit in the L2 cache."""
COLUMNS = 64
"""Number of columns of a cache that a program reads at a time."""
COLUMNS_OF_A_PART = 1024
"""Length of a buffer above which several programs share the columns of a head."""


@lru_cache
def can_overlap(device: torch.device) -> bool:
    """Returns whether a kernel can start while the one before it runs (programmatic dependent launch).

    Such a kernel reads what other kernels write after `gdc_wait` only. It needs Hopper and Triton 3.4.
    """
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return is_hopper and hasattr(tl.extra.cuda, "gdc_wait")


def dropout_mask(keys: Tensor, n: int, threshold: int) -> Tensor:
    """Computes `icenet_torch.nn.random.random_bits_at_least` in one kernel.

    keys int32 `[rows, 2]` to bool `[rows, n]`. PyTorch's own operations take more than a hundred kernels: 2,000 us
    instead of 10 us for 32 x 512 x 512 values on an H100.
    """
    rows = keys.shape[0]
    out = torch.empty((rows, n), dtype=torch.bool, device=keys.device)
    half = (n + 1) // 2
    if out.numel():
        with torch.cuda.device(keys.device):
            _mask[(triton.cdiv(half, BLOCK), rows)](keys.contiguous(), out, n, half, threshold, BLOCK)
    return out


def dropout(x: Tensor, keys: Tensor, threshold: int, scale: float) -> tuple[Tensor, Tensor]:
    """Applies dropout to a contiguous x. Returns x * scale or zero, and the mask, both in the shape of x."""
    rows = keys.shape[0]
    out, keep = torch.empty_like(x), torch.empty(x.shape, dtype=torch.bool, device=x.device)
    n = x.numel() // rows
    half = (n + 1) // 2
    keys = keys.contiguous()
    if x.numel():
        with torch.cuda.device(x.device):
            _dropout[(triton.cdiv(half, BLOCK), rows)](x, out, keep, keys, n, half, threshold, scale, BLOCK)
    return out, keep


def cross_entropy(
    logits: Tensor, labels: Tensor, count: Tensor, softcap: float | None, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Computes `icenet_torch.nn.loss._chunk`. The gradient takes the place of the logits.

    A program reads a row twice, the second time from the L2 cache.
    """
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        with torch.cuda.device(logits.device):
            _cross_entropy[(rows,)](
                logits,
                labels,
                count,
                losses,
                softcap or 1.0,
                width,
                CAPPED=softcap is not None,
                GRADIENT=needs_gradient,
                BLOCK=min(CROSS_ENTROPY_BLOCK, triton.next_power_of_2(width)),
                num_warps=CROSS_ENTROPY_WARPS,
            )
    return losses, logits if needs_gradient else None


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
def _four_rounds(x0, x1, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr):  # type: ignore[no-untyped-def]
    x0 += x1
    x1 = ((x1 << a) | (x1 >> (32 - a))) ^ x0
    x0 += x1
    x1 = ((x1 << b) | (x1 >> (32 - b))) ^ x0
    x0 += x1
    x1 = ((x1 << c) | (x1 >> (32 - c))) ^ x0
    x0 += x1
    x1 = ((x1 << d) | (x1 >> (32 - d))) ^ x0
    return x0, x1


@triton.jit
def _words(keys, row, c, half):  # type: ignore[no-untyped-def]
    """Computes threefry-2x32-20 of the counters (c, c + half) under the key of a row; see `icenet.core.rng`."""
    k0 = tl.load(keys + 2 * row).to(tl.uint32, bitcast=True)
    k1 = tl.load(keys + 2 * row + 1).to(tl.uint32, bitcast=True)
    k2 = k0 ^ k1 ^ 0x1BD11BDA
    x0 = c.to(tl.uint32) + k0
    x1 = (c + half).to(tl.uint32) + k1
    x0, x1 = _four_rounds(x0, x1, 13, 15, 26, 6)
    x0 += k1
    x1 += k2 + 1
    x0, x1 = _four_rounds(x0, x1, 17, 29, 16, 24)
    x0 += k2
    x1 += k0 + 2
    x0, x1 = _four_rounds(x0, x1, 13, 15, 26, 6)
    x0 += k0
    x1 += k1 + 3
    x0, x1 = _four_rounds(x0, x1, 17, 29, 16, 24)
    x0 += k1
    x1 += k2 + 4
    x0, x1 = _four_rounds(x0, x1, 13, 15, 26, 6)
    x0 += k2
    x1 += k0 + 5
    return x0, x1


@triton.jit
def _mask(keys, out, n, half, threshold, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x0, x1 = _words(keys, row, c, half)
    first = out + row * n + c
    tl.store(first, x0 >= threshold, mask=c < half)
    tl.store(first + half, x1 >= threshold, mask=c + half < n)


@triton.jit
def _dropout(x, out, keep, keys, n, half, threshold, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x0, x1 = _words(keys, row, c, half)
    index = row * n + c
    valid = c < half
    kept = x0 >= threshold
    tl.store(keep + index, kept, mask=valid)
    tl.store(out + index, tl.where(kept, tl.load(x + index, mask=valid) * scale, 0.0), mask=valid)
    index += half
    valid = c + half < n
    kept = x1 >= threshold
    tl.store(keep + index, kept, mask=valid)
    tl.store(out + index, tl.where(kept, tl.load(x + index, mask=valid) * scale, 0.0), mask=valid)


@triton.jit
def _logits(row, column, width, cap, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns a part of a row of logits, fp32, after the softcap; -inf outside of the row."""
    x = tl.load(row + column, mask=column < width, other=0.0).to(tl.float32)
    if CAPPED:
        x = cap * (1 - 2 / (tl.exp(2 * x / cap) + 1))  # tanh
    return tl.where(column < width, x, float("-inf"))


@triton.jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits, labels, count, losses, cap, width, CAPPED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64)
    row = logits + place * width
    label = tl.load(labels + place)
    top = tl.full((), float("-inf"), tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        x = _logits(row, start + tl.arange(0, BLOCK), width, cap, CAPPED)
        higher = tl.maximum(top, tl.max(x, axis=0))
        totals = totals * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    log_total = top + tl.log(tl.sum(totals, axis=0))
    chosen = tl.load(row + tl.maximum(label, 0)).to(tl.float32)
    if CAPPED:
        chosen = cap * (1 - 2 / (tl.exp(2 * chosen / cap) + 1))
    tl.store(losses + place, tl.where(label >= 0, log_total - chosen, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # the logit of the label was read before another thread replaces it
        weight = 1.0 / tl.load(count).to(tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = _logits(row, column, width, cap, CAPPED)
            gradient = (tl.exp(x - log_total) - (column == label)) * weight
            if CAPPED:
                gradient *= 1 - x * x / (cap * cap)
            gradient = tl.where(label >= 0, gradient, 0.0)
            tl.store(row + column, gradient.to(logits.dtype.element_ty), mask=column < width)


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
