"""Dropout whose masks are a pure function of their keys, PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
from torch import nn

from icenet.core import rng
from icenet_torch.nn.arrays import Array
from icenet_torch.nn.random import signed, threefry2x32, threefry2x32_in_place


class Dropout(nn.Module):
    """Zeroes each value with probability p in training and scales the rest by 1 / (1 - p).

    With keys (see `BaseModel.seed_dropout`) the mask is a pure function of them, the same on both backends, each
    row of the batch, its first axis, under its own key; without, the framework's own generator draws it. The mask
    of images is drawn for `[B, H, W, C]`.
    """

    def __init__(self, p: float, images: bool = False) -> None:
        super().__init__()
        self.p = p
        self.images = images
        self._keys: Array | None = None

    def forward(self, x: Array) -> Array:
        if not self.training or self.p == 0:
            return x
        keyed = self._keys is not None and not self.images
        if keyed and x.is_cuda and not torch.compiler.is_compiling() and _kernels():
            return _Fused.apply(x, keys_for_rows(self._keys, x.shape), self.p)
        shape = x.permute(0, 2, 3, 1).shape if self.images else x.shape
        keep = dropout_mask(shape, self.p, self._keys, x.device)
        if self.images:
            keep = torch.empty_like(x, dtype=torch.bool).copy_(keep.permute(0, 3, 1, 2))  # in x's memory format
        return _Masked.apply(x, keep, 1 / (1 - self.p))


class _Masked(torch.autograd.Function):
    """x where a mask is True, times a scale; 0 elsewhere. Autograd's own backward pass makes two arrays more."""

    @staticmethod
    def forward(ctx: Any, x: Array, keep: Array, scale: float) -> Array:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return masked(x, keep, scale)

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Array, None, None]:
        return masked(cotangent, ctx.saved_tensors[0], ctx.scale), None, None


class _Fused(_Masked):
    """Dropout on CUDA, the mask drawn in the kernel that applies it."""

    @staticmethod
    def forward(ctx: Any, x: Array, keys: Array, p: float) -> Array:
        ctx.scale = 1 / (1 - p)
        out, keep = _kernels().dropout(x.contiguous(), keys, rng.dropout_threshold(p), ctx.scale)
        ctx.save_for_backward(keep)
        return out


def masked(x: Array, keep: Array, scale: float) -> Array:
    """x where `keep` is True, times `scale`; 0 elsewhere."""
    if x.is_cuda:
        return torch.ops.aten.native_dropout_backward(x, keep, scale)  # their product, in one kernel
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device)).mul_(scale)


def seed_dropouts(dropouts: list[Dropout], keys: Array | None) -> None:
    """Gives each dropout its keys, int32 `[dropouts, rows, 2]`; None: the framework's own generator."""
    for index, dropout in enumerate(dropouts):
        dropout._keys = None if keys is None else keys[index]


def dropout_mask(shape: tuple[int, ...], p: float, keys: Array | None, device: torch.device) -> Array:
    """A mask, bool, that is True with probability 1 - p; keys int32 `[rows, 2]`, one for each row."""
    if keys is None:
        return torch.rand(shape, device=device) >= p
    keys = keys_for_rows(keys, shape)
    rows = keys.shape[0]
    n = math.prod(shape) // rows
    half = (n + 1) // 2
    if device.type == "cuda" and not torch.compiler.is_compiling() and (kernels := _kernels()) is not None:
        return kernels.dropout_mask(keys, n, rng.dropout_threshold(p)).reshape(shape)
    out = torch.empty((rows, 2, half), dtype=torch.bool, device=device)
    # bit patterns are signed here: flipping the top bit of both sides keeps the unsigned order
    top, threshold = signed(0x80000000), signed(rng.dropout_threshold(p) ^ 0x80000000)
    in_pieces = device.type == "cpu" and not torch.compiler.is_compiling()
    # On a CPU the hundred passes of the hash stay in the cache when they work in place on short pieces. PyTorch cuts
    # more than 2^15 values up for its threads: faster on an idle machine, and many times slower on a busy one, where
    # each of the passes waits for every thread. With one thread longer pieces cost fewer calls.
    piece = 1 << (15 if torch.get_num_threads() > 1 else 16) if in_pieces else max(rows * half, 1)
    high, wide = min(max(piece // max(half, 1), 1), rows), max(min(piece, half), 1)
    room = torch.empty((3, high * wide), dtype=torch.int32, device=device) if in_pieces else None
    for row in range(0, rows, high):
        key = (keys[row : row + high, :1], keys[row : row + high, 1:])
        for start in range(0, half, wide):
            first = torch.arange(start, min(start + wide, half), dtype=torch.int32, device=device)
            if room is None:
                words = threefry2x32(key, (first, first + half))
            else:
                words = threefry2x32_in_place(room, key, (first, first + half))
            for index, word in enumerate(words):
                torch.ge(word ^ top, threshold, out=out[row : row + high, index, start : start + wide])
    return out.reshape(rows, -1)[:, :n].reshape(shape)


@functools.cache
def _kernels() -> Any:
    """`icenet_torch.nn.kernels` where Triton is installed, else None."""
    if importlib.util.find_spec("triton") is None:
        return None
    from icenet_torch.nn import kernels

    return kernels


def keys_for_rows(keys: Array, shape: tuple[int, ...]) -> Array:
    """The keys for an array of `shape`: those of its rows; the first alone where its first axis holds no rows."""
    return keys if shape[0] % keys.shape[0] == 0 else keys[:1]
