"""Triton kernel of the cross-entropy and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CROSS_ENTROPY_BLOCK, CROSS_ENTROPY_WARPS = 8192, 32
"""Logits that a program reads at a time, and its warps: so many that the rows in work fit in the L2 cache."""


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
