"""Dropout whose masks are a pure function of their keys, MLX."""

from __future__ import annotations

import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.core import rng
from icenet.nn.arrays import Array


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

    def __call__(self, x: Array) -> Array:
        if not self.training or self.p == 0:
            return x
        keep = dropout_mask(x.shape, self.p, self._keys)
        return mx.where(keep, x * (1 / (1 - self.p)), mx.zeros((), x.dtype))


def seed_dropouts(dropouts: list[Dropout], keys: Array | None) -> None:
    """Gives each dropout its keys, uint32 `[dropouts, rows, 2]`; None: the framework's own generator."""
    for index, dropout in enumerate(dropouts):
        dropout._keys = None if keys is None else keys[index]


def dropout_mask(shape: tuple[int, ...], p: float, keys: Array | None) -> Array:
    """A mask, bool, that is True with probability 1 - p; keys uint32 `[rows, 2]`, one for each row."""
    if keys is None:
        return mx.random.bernoulli(1 - p, shape)
    keys = keys_for_rows(keys, shape)
    n = math.prod(shape) // keys.shape[0]
    draw = mx.vmap(lambda key: mx.random.split(key, (n + 1) // 2))  # the public way to MLX's random bits
    words = draw(keys).reshape(keys.shape[0], -1)[:, :n]
    return (words >= mx.array(rng.dropout_threshold(p), mx.uint32)).reshape(shape)


def keys_for_rows(keys: Array, shape: tuple[int, ...]) -> Array:
    """The keys for an array of `shape`: those of its rows; the first alone where its first axis holds no rows."""
    return keys if shape[0] % keys.shape[0] == 0 else keys[:1]
