"""Augmentation and normalization of images. Augmentation is a pure function of (seed, epoch, image)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from icenet.core import rng

Pixels = NDArray[np.uint8]


def augment(images: Pixels, indices: NDArray[np.int64], seed: int, epoch: int, *, flip: bool, padding: int) -> Pixels:
    """Crops each image at random after padding, then mirrors a random half of the images.

    Args:
        images: uint8 `[B, H, W, C]`.
        indices: Indices of the images in the dataset, int64 `[B]`. The random numbers depend on them, and therefore
            not on the batch or its size.
        seed: Seed of the run.
        epoch: The epoch, counted from 0.
        flip: Whether to mirror images horizontally, each with probability 1/2.
        padding: Width of the border of zeros, in pixels; a crop has the size of the image. 0: no crop.

    Returns:
        uint8 `[B, H, W, C]`.
    """
    count, height, width, channels = images.shape
    keys = rng.fold(rng.key(seed, "augment", epoch)[None, :], indices)  # [B, 2]
    corners = np.zeros((count, 2), int)  # top and left edge of each crop
    mirrored = np.zeros(count, np.bool_)
    if padding:
        edge = (padding, padding)
        images = np.pad(images, ((0, 0), edge, edge, (0, 0)))
        words = rng.fold(keys, "crop").astype(np.uint64)  # [B, 2]
        corners = ((words * np.uint64(2 * padding + 1)) >> np.uint64(32)).astype(int)
    if flip:
        mirrored = rng.fold(keys, "flip")[:, 0] >= 2**31
    result = np.empty((count, height, width, channels), np.uint8)
    for image, source, (top, left), mirror in zip(result, images, corners, mirrored, strict=True):
        crop = source[top : top + height, left : left + width]
        if mirror:  # by channel: 64 images of 224 x 224 x 3 take 3 ms instead of 9
            for channel in range(channels):
                image[..., channel] = crop[:, ::-1, channel]
        else:
            image[:] = crop
    return result


def normalize(images: Pixels, mean: list[float], std: list[float]) -> NDArray[np.float32]:
    """Returns (value / 255 - mean) / std per channel, float32, for uint8 images `[..., C]`."""
    scale, shift = pixel_scale(mean, std)
    return images.astype(np.float32) * scale - shift


def pixel_scale(mean: list[float], std: list[float]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns scale and shift, float32 `[C]`, with which `normalize` computes value * scale - shift."""
    scale = 1 / (255 * np.asarray(std, np.float64))
    shift = np.asarray(mean, np.float64) / np.asarray(std, np.float64)
    return scale.astype(np.float32), shift.astype(np.float32)
