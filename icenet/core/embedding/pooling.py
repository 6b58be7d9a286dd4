"""Pooling of the hidden states of tokens to one vector, as in sentence-transformers (Reimers and Gurevych, 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.config.embedding import Pooling

Floats = NDArray[np.float32]


def pool(hidden: Floats, mask: NDArray[np.bool_], modes: Sequence[Pooling]) -> Floats:
    """Returns one vector for each row, float32 `[B, len(modes) * D]`.

    Args:
        hidden: Hidden states, float32 `[B, T, D]`.
        mask: bool `[B, T]`, True for the tokens that count.
        modes: For the tokens x_1 to x_n of a row that count:
            cls: x_1; last: x_n;
            max: the maximum of each component; mean: sum x_i / n; mean_sqrt_length: sum x_i / sqrt(n);
            weighted_mean: sum p_i x_i / sum p_i, where p_i is the position of x_i in the row, from 1.
            The vectors of several are concatenated.
    """
    return np.concatenate([_pool(hidden, mask, mode) for mode in modes], axis=-1)


def normalize(vectors: Floats) -> Floats:
    """Returns vectors `[B, D]` of length 1; a vector of zeros stays as it is."""
    lengths = np.sqrt(np.square(vectors, dtype=np.float64).sum(axis=-1, keepdims=True))
    normalized: Floats = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return normalized


def _pool(hidden: Floats, mask: NDArray[np.bool_], mode: Pooling) -> Floats:
    rows = np.arange(len(hidden))
    if mode == "cls":
        return hidden[rows, mask.argmax(axis=1)]
    if mode == "last":
        return hidden[rows, mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)]
    if mode == "max":
        return np.asarray(np.where(mask[:, :, None], hidden, np.float32(-np.inf)).max(axis=1))
    weights = mask.astype(np.float64)
    if mode == "weighted_mean":
        weights *= np.arange(1, mask.shape[1] + 1)
    total = weights.sum(axis=1)
    divisor: NDArray[Any] = np.sqrt(total) if mode == "mean_sqrt_length" else total
    # padding may be infinite, and zero times infinity is no number
    kept = np.where(mask[:, :, None], hidden, np.float32(0))
    summed = np.einsum("bt,btd->bd", weights, kept.astype(np.float64), optimize=True)
    return (summed / np.maximum(divisor, 1e-9)[:, None]).astype(np.float32)
