"""Triton kernels for linear layers of a few rows: norm, product, bias, activation and residual in one.

The module is imported only on a GPU and with Triton, as `icenet_torch.nn.kernels` is.
"""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from icenet_torch.nn.kernels.common import can_overlap

TILE_BYTES = 32768
"""Bytes of weights that a program reads at a time: enough to keep the memory busy."""
LONGEST_BLOCK = 4096
"""Number of inputs that a program reads at a time."""


class Norm(NamedTuple):
    """A normalization of the inputs: `kind` is "layer", "rms" or "rms_offset", which multiplies by 1 + weight."""

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float


class Blocks(NamedTuple):
    """The part of a product that a program computes."""

    rows: int
    outputs: int
    inputs: int
    warps: int


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    activation: str | None = None,
    is_gated: bool = False,
    residual: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Computes residual + activation(norm(x) W^T + b), rounded where the separate operations round.

    Args:
        x: `[rows, in]`, contiguous.
        weight: `[out, in]`, contiguous, in the dtype of x. If it is gated, its first half is that of the gate, and
            the result is activation(gate) * up, `[rows, out / 2]`.
        bias: `[out]`.
        norm: The norm of x; None: x is used as it is.
        activation: See `icenet_torch.nn.activation`; None: none.
        is_gated: See `weight`.
        residual: Added to the result, with its shape, contiguous.
        blocks: None: `choose_blocks`.

    Returns:
        `[rows, out]` in the dtype of x.
    """
    rows, size = x.shape
    outputs = weight.shape[0] // (2 if is_gated else 1)
    if blocks is None:
        blocks = choose_blocks(rows, outputs, size, is_gated, x.element_size(), processors(x.device))
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    overlaps = can_overlap(x.device)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _linear[(triton.cdiv(outputs, blocks.outputs),)](
            *(x, weight, x if bias is None else bias),
            *(x if norm is None else norm.weight, x if norm is None or norm.bias is None else norm.bias),
            x if residual is None else residual,
            out,
            rows,
            outputs,
            0.0 if norm is None else norm.eps,
            SIZE=size,
            ROWS=blocks.rows,
            BLOCK_N=blocks.outputs,
            BLOCK_K=blocks.inputs,
            NORM="none" if norm is None else norm.kind,
            NORM_BIAS=norm is not None and norm.bias is not None,
            BIAS=bias is not None,
            ACTIVATION=activation or "none",
            GATED=is_gated,
            RESIDUAL=residual is not None,
            OVERLAPS=overlaps,
            num_warps=blocks.warps,
            **({"launch_pdl": True} if overlaps else {}),
        )
    return out


@lru_cache
def choose_blocks(rows: int, outputs: int, size: int, is_gated: bool, itemsize: int, processors: int) -> Blocks:
    """Returns the part of a product that a program computes.

    It has as many outputs as `TILE_BYTES` allow, but not so many that a multiprocessor has no program.
    """
    most = 1 << max(0, (outputs // processors).bit_length() - 1)
    padded = triton.next_power_of_2(rows)
    inputs = min(triton.next_power_of_2(size), LONGEST_BLOCK)
    tile = TILE_BYTES // (itemsize * (2 if is_gated else 1) * inputs)
    return Blocks(padded, max(1, min(tile, most)), inputs, 4)


@lru_cache
def processors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == "gelu":
        x = x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * 0.5 * (2 - 2 / (tl.exp(2 * inner) + 1))
    elif ACTIVATION == "silu":
        x = x / (1 + tl.exp(-x))
    elif ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    return x


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]
    x, row, rows, eps, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr
):
    """Returns the mean and the factor of each row, fp32 `[ROWS]`."""
    k = tl.arange(0, BLOCK_K)
    mean = tl.zeros((ROWS,), tl.float32)
    if NORM == "layer":
        sums = tl.zeros((ROWS, BLOCK_K), tl.float32)
        for start in range(0, SIZE, BLOCK_K):
            valid = (row < rows)[:, None] & (start + k < SIZE)[None, :]
            sums += tl.load(x + row[:, None] * SIZE + start + k[None, :], mask=valid, other=0.0).to(tl.float32)
        mean = tl.sum(sums, axis=1) / SIZE
    squares = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for start in range(0, SIZE, BLOCK_K):
        valid = (row < rows)[:, None] & (start + k < SIZE)[None, :]
        value = tl.load(x + row[:, None] * SIZE + start + k[None, :], mask=valid, other=0.0).to(tl.float32)
        difference = tl.where(valid, value - mean[:, None], 0.0)
        squares += difference * difference
    return mean, 1 / tl.sqrt(tl.sum(squares, axis=1) / SIZE + eps)


@triton.jit
def _norm_parameters(  # type: ignore[no-untyped-def]
    norm_weight, norm_bias, k, inside, NORM: tl.constexpr, NORM_BIAS: tl.constexpr
):
    """Returns what the values are multiplied by and what is added, fp32."""
    weight = tl.load(norm_weight + k, mask=inside, other=0.0).to(tl.float32)
    if NORM == "rms_offset":
        weight += 1
    bias = tl.zeros_like(weight)
    if NORM_BIAS:
        bias = tl.load(norm_bias + k, mask=inside, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def _biases(bias, n, N, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the biases of some outputs and of what they are multiplied by, fp32."""
    value = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    up = value
    if GATED:
        up = tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)
    return value, up


@triton.jit
def _finished(  # type: ignore[no-untyped-def]
    value, up, added, dtype: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr
):
    """Applies the activation and adds the residual. Each operation rounds, as the separate ones do."""
    value = value.to(dtype)
    if ACTIVATION != "none":
        value = _activated(value.to(tl.float32), ACTIVATION).to(dtype)
    if GATED:
        value = (value.to(tl.float32) * up.to(dtype).to(tl.float32)).to(dtype)
    if RESIDUAL:
        value = (value.to(tl.float32) + added).to(dtype)
    return value


@triton.jit(do_not_specialize=["rows", "N", "eps"])
def _linear(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    residual,
    out,
    rows,
    N,
    eps,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Some outputs of all rows. The weights are read before the inputs, which the kernel before this one computes."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = tl.arange(0, ROWS)
    at = weight + n.to(tl.int64)[:, None] * SIZE + k[None, :]
    ups = at + N.to(tl.int64) * SIZE
    both = (n < N)[:, None] & (k < SIZE)[None, :]
    tile = tl.load(at, mask=both, other=0.0)
    up_tile = tile
    if GATED:
        up_tile = tl.load(ups, mask=both, other=0.0)
    if NORM != "none":
        gamma, beta = _norm_parameters(norm_weight, norm_bias, k, k < SIZE, NORM, NORM_BIAS)
    if BIAS:
        offset, up_offset = _biases(bias, n, N, GATED)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    place = row[:, None] * N + n[None, :]
    valid = (row < rows)[:, None] & (n < N)[None, :]
    acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
    up = tl.zeros((ROWS, BLOCK_N), tl.float32)
    added = acc
    if RESIDUAL:
        added = tl.load(residual + place, mask=valid, other=0.0).to(tl.float32)
    if NORM != "none":
        mean, factor = _statistics(x, row, rows, eps, SIZE, ROWS, BLOCK_K, NORM)
    for start in range(0, SIZE, BLOCK_K):
        w = tile.to(tl.float32)
        w_up = up_tile.to(tl.float32)
        inside = start + k < SIZE
        if NORM != "none":
            g, b = gamma, beta
        if BLOCK_K < SIZE:  # the next weights are read meanwhile
            after = start + BLOCK_K + k
            both = (n < N)[:, None] & (after < SIZE)[None, :]
            tile = tl.load(at + start + BLOCK_K, mask=both, other=0.0)
            if GATED:
                up_tile = tl.load(ups + start + BLOCK_K, mask=both, other=0.0)
            if NORM != "none":
                gamma, beta = _norm_parameters(norm_weight, norm_bias, after, after < SIZE, NORM, NORM_BIAS)
        for r in tl.static_range(ROWS):
            value = tl.load(x + r * SIZE + start + k, mask=inside & (r < rows), other=0.0).to(tl.float32)
            if NORM != "none":
                own_mean = tl.sum(tl.where(row == r, mean, 0.0), axis=0)
                own_factor = tl.sum(tl.where(row == r, factor, 0.0), axis=0)
                value = ((value - own_mean) * own_factor * g + b).to(out.dtype.element_ty).to(tl.float32)
            own = (row == r)[:, None]
            acc += tl.where(own, tl.sum(w * value[None, :], axis=1)[None, :], 0.0)
            if GATED:
                up += tl.where(own, tl.sum(w_up * value[None, :], axis=1)[None, :], 0.0)
    if BIAS:
        acc += offset[None, :]
        up += up_offset[None, :]
    tl.store(out + place, _finished(acc, up, added, out.dtype.element_ty, ACTIVATION, GATED, RESIDUAL), mask=valid)
