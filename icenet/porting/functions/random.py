"""Random numbers."""

# The text of these functions is copied into ports, without types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx


def dropout(x, p, training):
    """Returns x with elements set to 0 at random in training, and the others scaled."""
    if not training or p == 0:
        return x
    if p == 1:
        return x * 0
    return mx.where(mx.random.bernoulli(1 - p, x.shape), x / (1 - p), 0)


def feature_dropout(x, p, training):
    """Returns x with whole channels, the second axis, set to 0 at random in training."""
    if not training or p == 0:
        return x
    mask = mx.random.bernoulli(1 - p, (*x.shape[:2], *[1] * (x.ndim - 2)))
    return mx.where(mask, x / (1 - p), 0) if p < 1 else x * 0


def alpha_dropout(x, p, training, whole_channels=False):
    """Returns x with elements set to the lower limit of SELU at random in training (Klambauer et al., 2017)."""
    if not training or p == 0:
        return x
    alpha = 1.7580993408473766
    scale = (1 - p) ** -0.5 * (1 + p * alpha**2) ** -0.5 if p < 1 else 0.0
    shape = (*x.shape[:2], *[1] * (x.ndim - 2)) if whole_channels else x.shape
    keep = mx.random.bernoulli(1 - p, shape)
    return scale * mx.where(keep, x, -alpha) + scale * alpha * p


def normal(mean, std, size=None):
    """Returns normal numbers."""
    shape = size if size is not None else mx.broadcast_arrays(mx.array(mean), mx.array(std))[0].shape
    return mx.random.normal(shape) * std + mean


def multinomial(p, count, replacement=False):
    """Returns indices drawn with some weights."""
    logits = mx.log(p)
    if replacement:
        return mx.random.categorical(logits, num_samples=count).astype(mx.int64)
    noise = mx.random.gumbel(p.shape)
    return mx.argsort(-(logits + noise), axis=-1)[..., :count].astype(mx.int64)
