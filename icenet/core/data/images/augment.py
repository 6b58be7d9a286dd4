"""Augmentation of training images: what is done to an image is a pure function of (seed, epoch, image)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from icenet.core import rng

Pixels = NDArray[np.uint8]


def augment(images: Pixels, indices: NDArray[np.int64], seed: int, epoch: int, *, flip: bool, padding: int) -> Pixels:
    """A random crop out of a border of `padding` zeros, then with `flip` a mirror image of every second one.

    Args:
        images: uint8 `[B, H, W, C]`.
        indices: which images of the data these are, int64 `[B]`: the draws depend on them, and so neither on
            the batch nor on its size.
    """
    keys = rng.fold(rng.key(seed, "augment", epoch)[None, :], indices)  # [B, 2]
    if padding:
        images = _crop(images, rng.fold(keys, "crop"), padding)
    if flip:
        mirrored = rng.fold(keys, "flip")[:, 0] >= 2**31
        images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    return images


def _crop(images: Pixels, words: rng.Words, padding: int) -> Pixels:
    """Each image at its own offset, from 0 to 2 * padding each way, `words` uint32 `[B, 2]` drawing it."""
    edge = (padding, padding)
    padded = np.pad(images, ((0, 0), edge, edge, (0, 0)))
    offsets = (words.astype(np.uint64) * np.uint64(2 * padding + 1)) >> np.uint64(32)  # [B, 2]
    height, width = images.shape[1:3]
    cropped = np.empty_like(images)
    for image, source, (top, left) in zip(cropped, padded, offsets.astype(int), strict=True):
        image[:] = source[top : top + height, left : left + width]
    return cropped


def normalize(images: Pixels, mean: list[float], std: list[float]) -> NDArray[np.float32]:
    """Values 0 to 255, uint8 `[..., C]`, as (value / 255 - mean) / std of their channel, float32."""
    scale = 1 / (255 * np.asarray(std, np.float64))
    shift = np.asarray(mean, np.float64) / np.asarray(std, np.float64)
    return images.astype(np.float32) * scale.astype(np.float32) - shift.astype(np.float32)
