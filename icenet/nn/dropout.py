"""Dropout with masks that are a pure function of their keys, MLX."""

from __future__ import annotations

import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.core import rng
from icenet.core.models.dropout import keys_for_rows
from icenet.nn.arrays import Array
from icenet.nn.random import random_bits


class Dropout(nn.Module):
    """Sets each value to zero with probability p during training, and scales the others by 1 / (1 - p).

    With keys (see `BaseModel.seed_dropout`) the mask is a pure function of them and the same on both backends. Each
    row of the batch, which is the first axis, has its own key. Without keys MLX's generator draws the mask.

    Args:
        p: Probability of zero.
        images: Whether the inputs are images. Their masks are drawn for `[B, H, W, C]` on both backends.
    """

    def __init__(self, p: float, images: bool = False) -> None:
        super().__init__()
        self.p = p
        self.images = images
        self._keys: Array | None = None  # MLX takes an array for a parameter unless its name begins with "_"

    def __call__(self, x: Array) -> Array:
        if not self.is_active:
            return x
        keep = dropout_mask(x.shape, self.p, self._keys)
        return mx.where(keep, x * (1 / (1 - self.p)), mx.zeros((), x.dtype))

    @property
    def is_active(self) -> bool:
        """Whether the layer sets any values to zero."""
        return bool(self.training and self.p > 0)

    @property
    def is_seeded(self) -> bool:
        """Whether the layer has keys."""
        return self._keys is not None

    def seed(self, keys: Array | None) -> None:
        """Sets the keys, uint32 `[rows, 2]`, or None for MLX's generator."""
        self._keys = keys


def dropout_mask(shape: tuple[int, ...], p: float, keys: Array | None) -> Array:
    """Returns a bool mask that is True with probability 1 - p; keys are uint32 `[rows, 2]`, one per row."""
    if keys is None:
        return mx.random.bernoulli(1 - p, shape)
    keys = keys_for_rows(keys, shape)
    words = random_bits(keys, math.prod(shape) // keys.shape[0])
    return (words >= mx.array(rng.dropout_threshold(p), mx.uint32)).reshape(shape)
