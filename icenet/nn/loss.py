"""Loss and accuracy, MLX."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn import exact
from icenet.nn.arrays import Array


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Returns the mean cross-entropy in nats, fp32, and the number of labels that count.

    Args:
        logits: `[..., V]`.
        labels: int `[...]`; negative labels are ignored.
    """
    counted = labels >= 0
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, mx.where(counted, labels, 0)[..., None], axis=-1).squeeze(-1)
    losses = exact.logsumexp(logits) - chosen
    count = counted.sum()
    return exact.weighted_mean(losses, counted / mx.maximum(count, 1)), count


def count_correct(logits: Array, labels: Array) -> Array:
    """Returns the number of rows of logits `[B, V]` with the maximum at their label, labels `[B]`."""
    return (logits.argmax(axis=-1) == labels).sum()
