"""The loss and the count of right answers, MLX."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.nn.arrays import Array


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """The mean cross-entropy in nats, fp32, and the number of labels counted.

    logits `[..., V]`; labels int `[...]`, where a negative label counts for nothing. The mean is taken twice,
    the second time of what is left over: a single sum of a thousand losses is off by several roundings.
    """
    counted = labels >= 0
    logits = logits.astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, mx.where(counted, labels, 0))
    count = counted.sum()
    share = counted / mx.maximum(count, 1)
    rough = mx.stop_gradient((losses * share).sum())
    return rough + ((losses - rough) * share).sum(), count


def count_correct(logits: Array, labels: Array) -> Array:
    """How many rows of logits `[B, V]` are largest at their label."""
    return (logits.argmax(axis=-1) == labels).sum()
