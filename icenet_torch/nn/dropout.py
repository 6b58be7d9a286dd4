"""Dropout with masks that are a pure function of their keys, PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
from torch import nn

from icenet.core import rng
from icenet.core.models.dropout import keys_for_rows
from icenet_torch.nn.arrays import Array
from icenet_torch.nn.random import random_bits_at_least


class Dropout(nn.Module):
    """Sets each value to zero with probability p during training, and scales the others by 1 / (1 - p).

    With keys (see `BaseModel.seed_dropout`) the mask is a pure function of them and the same on both backends. Each
    row of the batch, which is the first axis, has its own key. Without keys PyTorch's generator draws the mask.

    Args:
        p: Probability of zero.
        images: Whether the inputs are images. Their masks are drawn for `[B, H, W, C]` on both backends.
    """

    def __init__(self, p: float, images: bool = False) -> None:
        super().__init__()
        self.p = p
        self.images = images
        self._keys: Array | None = None

    def forward(self, x: Array) -> Array:
        if not self.is_active:
            return x
        if self._keys is not None and not self.images and (kernels := _kernels(x.device)):
            return _FusedDropout.apply(x, keys_for_rows(self._keys, x.shape), self.p, kernels)
        shape = x.permute(0, 2, 3, 1).shape if self.images else x.shape
        keep = dropout_mask(shape, self.p, self._keys, x.device)
        if self.images:
            keep = torch.empty_like(x, dtype=torch.bool).copy_(keep.permute(0, 3, 1, 2))  # in x's memory format
        return _MaskedScale.apply(x, keep, 1 / (1 - self.p))

    @property
    def is_active(self) -> bool:
        """Whether the layer sets any values to zero."""
        return bool(self.training and self.p > 0)

    @property
    def is_seeded(self) -> bool:
        """Whether the layer has keys."""
        return self._keys is not None

    def seed(self, keys: Array | None) -> None:
        """Sets the keys, int32 `[rows, 2]`, or None for PyTorch's generator."""
        self._keys = keys


def dropout_mask(shape: tuple[int, ...], p: float, keys: Array | None, device: torch.device) -> Array:
    """Returns a bool mask that is True with probability 1 - p; keys are int32 `[rows, 2]`, one per row."""
    if keys is None:
        return torch.rand(shape, device=device) >= p
    keys = keys_for_rows(keys, shape)
    n, threshold = math.prod(shape) // keys.shape[0], rng.dropout_threshold(p)
    kernels = _kernels(device)
    keep = kernels.dropout_mask(keys, n, threshold) if kernels else random_bits_at_least(keys, n, threshold)
    return keep.reshape(shape)


class _MaskedScale(torch.autograd.Function):
    """`masked_scale` whose backward pass allocates one array. Autograd's own would allocate two more."""

    @staticmethod
    def forward(ctx: Any, x: Array, keep: Array, scale: float) -> Array:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return masked_scale(x, keep, scale)

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Array | None, ...]:
        return masked_scale(cotangent, ctx.saved_tensors[0], ctx.scale), None, None


class _FusedDropout(torch.autograd.Function):
    """Dropout on CUDA. One kernel draws the mask and applies it."""

    @staticmethod
    def forward(ctx: Any, x: Array, keys: Array, p: float, kernels: Any) -> Array:
        ctx.scale = 1 / (1 - p)
        out, keep = kernels.dropout(x.contiguous(), keys, rng.dropout_threshold(p), ctx.scale)
        ctx.save_for_backward(keep)
        return out

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Array | None, ...]:
        return masked_scale(cotangent, ctx.saved_tensors[0], ctx.scale), None, None, None


def masked_scale(x: Array, keep: Array, scale: float) -> Array:
    """Returns x times `scale` where `keep` is True, and zero elsewhere."""
    if x.is_cuda:
        return torch.ops.aten.native_dropout_backward(x, keep, scale)  # the same product in one kernel
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device)).mul_(scale)


def _kernels(device: torch.device) -> Any:
    """Returns `icenet_torch.nn.kernels` for eager code on CUDA with Triton, otherwise None."""
    return _import_kernels() if device.type == "cuda" and not torch.compiler.is_compiling() else None


@functools.cache
def _import_kernels() -> Any:
    if importlib.util.find_spec("triton") is None:
        return None
    from icenet_torch.nn import kernels

    return kernels
