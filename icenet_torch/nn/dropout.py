"""Dropout with masks that are a pure function of their keys, PyTorch.

The layers derive from those of PyTorch, and `key_dropouts` turns PyTorch's own layers in a model into them. With keys
(see `BaseModel.seed_dropout`) a mask is a pure function of them and the same on both backends. Each row of the batch,
which is the first axis, has its own key. Without keys PyTorch's generator draws the mask.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from icenet.core import rng
from icenet.core.errors import UsageError
from icenet.core.nn.classes import change_classes
from icenet.core.nn.dropout import KeyedCalls, check_channels, keys_for_rows
from icenet_torch.nn.arrays import Array, triton_kernels
from icenet_torch.nn.random import random_bits_at_least


class Dropout(KeyedCalls, nn.Dropout):
    """Sets each value to zero with probability p during training, and scales the others by 1 / (1 - p).

    Args:
        p: Probability of zero.
        images: Whether the inputs are images `[B, C, ...]`. Their masks are drawn for `[B, ..., C]` on both backends.
            None: no, and an error if a layer of the model takes channels first in an input of as many axes.
    """

    def __init__(self, p: float = 0.5, images: bool | None = None) -> None:
        super().__init__(p)
        self.images = images
        self.seed(None)

    # what `key_dropouts` knows of the model
    _path: str = ""
    _image_layers: Mapping[int, str] = MappingProxyType({})
    _is_native: bool = False

    def forward(self, x: Array) -> Array:
        if not self.is_active:
            return x
        keys = self.next_keys()
        if keys is None and self._is_native:
            return super().forward(x)
        images = bool(self.images)
        if self.images is None and keys is not None and x.ndim in self._image_layers:
            raise UsageError(
                f"{self._path}: the input {list(x.shape)} of this dropout has as many axes as that of "
                f"{self._image_layers[x.ndim]}. If it has channels first, use icenet_torch.nn.Dropout({self.p:g}, "
                "images=True), otherwise images=False: MLX has channels last, and the masks must be equal"
            )
        if keys is not None and not images and not self.inplace and (kernels := triton_kernels(x.device)):
            return _FusedDropout.apply(x, keys_for_rows(keys, x.shape), self.p, self.scale, kernels)
        last = (0, *range(2, x.ndim), 1) if images else range(x.ndim)  # channels last
        keep = dropout_mask(tuple(x.shape[axis] for axis in last), self.p, keys, x.device)
        if images:
            first = (0, x.ndim - 1, *range(1, x.ndim - 1))
            keep = torch.empty_like(x, dtype=torch.bool).copy_(keep.permute(first))  # in x's memory format
        y = _apply_mask(x, keep, self.scale)
        return x.copy_(y) if self.inplace else y


class _ChannelDropout(KeyedCalls, nn.Module):
    """Sets whole channels to zero."""

    axes: ClassVar[str]
    inplace: bool

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)
        self.seed(None)

    def forward(self, x: Array) -> Array:
        if not self.is_active:
            return x
        keys = self.next_keys()
        if keys is None:
            return super().forward(x)
        check_channels(type(self).__name__, x.shape, self.axes)
        keep = dropout_mask(x.shape[:2], self.p, keys, x.device)
        keep = keep.reshape(*x.shape[:2], *[1] * (x.ndim - 2)).expand(x.shape)
        y = _apply_mask(x, keep, self.scale)
        return x.copy_(y) if self.inplace else y


class Dropout1d(_ChannelDropout, nn.Dropout1d):
    """Sets whole channels of sequences `[B, C, L]` to zero with probability p.

    Args:
        p: Probability of zero.
    """

    axes = "[B, C, L]"


class Dropout2d(_ChannelDropout, nn.Dropout2d):
    """Sets whole channels of images `[B, C, H, W]` to zero with probability p.

    Args:
        p: Probability of zero.
    """

    axes = "[B, C, H, W]"


class Dropout3d(_ChannelDropout, nn.Dropout3d):
    """Sets whole channels of volumes `[B, C, D, H, W]` to zero with probability p.

    Args:
        p: Probability of zero.
    """

    axes = "[B, C, D, H, W]"


_KEYED: dict[type, type] = {
    nn.Dropout: Dropout,
    nn.Dropout1d: Dropout1d,
    nn.Dropout2d: Dropout2d,
    nn.Dropout3d: Dropout3d,
}


def key_dropouts(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Turns PyTorch's own dropout layers into those of this module, in place; subclasses of them stay.

    Args:
        modules: All modules of a model, by path.
    """
    found = list(modules)
    image_layers = {axes: path for path, module in reversed(found) if (axes := _image_axes(module))}
    for module in change_classes(found, _KEYED):
        module.images, module._is_native = None, True
        module.seed(None)
    for path, module in found:
        if isinstance(module, Dropout):
            module._path, module._image_layers = module._path or path, image_layers


def _image_axes(module: nn.Module) -> int | None:
    """Returns the number of axes of the input of a layer that takes channels first, otherwise None."""
    for cls in type(module).__mro__:
        if cls.__module__ in _IMAGE_MODULES and (name := re.search(r"(\d)d$", cls.__name__)):
            return int(name[1]) + 2
    return None


_IMAGE_MODULES = {f"torch.nn.modules.{name}" for name in ("conv", "pooling", "batchnorm", "instancenorm")}


def dropout_mask(shape: tuple[int, ...], p: float, keys: Array | None, device: torch.device) -> Array:
    """Returns a bool mask that is True with probability 1 - p; keys are int32 `[rows, 2]`, one per row."""
    if keys is None:
        return torch.rand(shape, device=device) >= p
    keys = keys_for_rows(keys, shape)
    n, threshold = math.prod(shape) // keys.shape[0], rng.dropout_threshold(p)
    kernels = triton_kernels(device)
    keep = kernels.dropout_mask(keys, n, threshold) if kernels else random_bits_at_least(keys, n, threshold)
    return keep.reshape(shape)


def _apply_mask(x: Array, keep: Array, scale: float) -> Array:
    """Returns x times `scale` where `keep` is True, and zero elsewhere."""
    if torch.compiler.is_compiling():
        # which fuses these. PyTorch 2.11 compiles the function below to a wrong gradient on a CPU
        return torch.where(keep, x * scale, torch.zeros((), dtype=x.dtype, device=x.device))
    y: Array = _MaskedScale.apply(x, keep, scale)
    return y


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
    def forward(ctx: Any, x: Array, keys: Array, p: float, scale: float, kernels: Any) -> Array:
        ctx.scale = scale
        out, keep = kernels.dropout(x.contiguous(), keys, rng.dropout_threshold(p), scale)
        ctx.save_for_backward(keep)
        return out

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Array | None, ...]:
        return masked_scale(cotangent, ctx.saved_tensors[0], ctx.scale), None, None, None, None


def masked_scale(x: Array, keep: Array, scale: float) -> Array:
    """Returns x times `scale` where `keep` is True, and zero elsewhere."""
    if x.is_cuda:
        return torch.ops.aten.native_dropout_backward(x, keep, scale)  # the same product in one kernel
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device)).mul_(scale)
