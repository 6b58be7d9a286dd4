"""Random numbers that are a pure function of their key, MLX."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.dropout import Array


def random_uniform(keys: Array, n: int) -> Array:
    """Uniform variates in [0, 1), float32 `[..., n]`, under each of the keys uint32 `[..., 2]`."""
    draw = mx.vmap(lambda key: mx.random.uniform(shape=(n,), key=key))
    return draw(keys.reshape(-1, 2)).reshape(*keys.shape[:-1], n)
