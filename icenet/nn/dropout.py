"""Dropout with masks that are a pure function of their keys, MLX.

The layers derive from those of MLX, and `key_dropouts` turns MLX's own layers in a model into them. With keys
(see `BaseModel.seed_dropout`) a mask is a pure function of them and the same on both backends. Each row of the batch,
which is the first axis, has its own key. Without keys MLX's generator draws the mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.core import rng
from icenet.core.nn.classes import change_classes
from icenet.core.nn.dropout import KeyedCalls, check_channels, keys_for_rows
from icenet.nn.arrays import Array
from icenet.nn.random import random_bits


class Dropout(KeyedCalls, nn.Dropout):
    """Sets each value to zero with probability p during training, and scales the others by 1 / (1 - p).

    Args:
        p: Probability of zero.
        images: Whether the inputs are images, whose masks are drawn for `[B, ..., C]` on both backends. It has no
            effect in MLX, where channels are last.
    """

    def __init__(self, p: float = 0.5, images: bool | None = None) -> None:
        super().__init__(p)
        self.p = p
        self.images = images
        self.seed(None)

    def __call__(self, x: Array) -> Array:
        if not self.is_active:
            return x
        keep = dropout_mask(x.shape, self.p, self.next_keys())
        return mx.where(keep, x * self.scale, mx.zeros((), x.dtype))


class _ChannelDropout(KeyedCalls):
    """Sets whole channels to zero."""

    axes: ClassVar[str]

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)  # type: ignore[call-arg]  # the constructor of MLX's layer
        self.p = p
        self.seed(None)

    def __call__(self, x: Array) -> Array:
        if not self.is_active:
            return x
        check_channels(type(self).__name__, x.shape, self.axes)
        keys, shape = self.next_keys(), (x.shape[0], x.shape[-1])
        keep = dropout_mask(shape, self.p, keys).reshape(shape[0], *[1] * (x.ndim - 2), shape[1])
        return mx.where(keep, x * self.scale, mx.zeros((), x.dtype))


class Dropout1d(_ChannelDropout, nn.Dropout):
    """Sets whole channels of sequences `[B, L, C]` to zero with probability p. MLX has no such layer.

    Args:
        p: Probability of zero.
    """

    axes = "[B, L, C]"


class Dropout2d(_ChannelDropout, nn.Dropout2d):
    """Sets whole channels of images `[B, H, W, C]` to zero with probability p.

    Args:
        p: Probability of zero.
    """

    axes = "[B, H, W, C]"


class Dropout3d(_ChannelDropout, nn.Dropout3d):
    """Sets whole channels of volumes `[B, D, H, W, C]` to zero with probability p.

    Args:
        p: Probability of zero.
    """

    axes = "[B, D, H, W, C]"


_KEYED: dict[type, type] = {nn.Dropout: Dropout, nn.Dropout2d: Dropout2d, nn.Dropout3d: Dropout3d}


def key_dropouts(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Turns MLX's own dropout layers into those of this module, in place; subclasses of them stay.

    Args:
        modules: All modules of a model, by path.
    """
    for module in change_classes(modules, _KEYED):
        module.p = round(1 - module._p_1, 15)  # MLX keeps 1 - p; 1 - 0.9 is not quite 0.1
        module.images = None
        module.seed(None)


def dropout_mask(shape: tuple[int, ...], p: float, keys: Array | None) -> Array:
    """Returns a bool mask that is True with probability 1 - p; keys are uint32 `[rows, 2]`, one per row."""
    if keys is None:
        return mx.random.bernoulli(1 - p, shape)
    keys = keys_for_rows(keys, shape)
    words = random_bits(keys, math.prod(shape) // keys.shape[0])
    return (words >= mx.array(rng.dropout_threshold(p), mx.uint32)).reshape(shape)
