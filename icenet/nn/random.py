"""Random numbers as a pure function of a key, MLX. They equal those of `icenet.core.rng` bit for bit."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array


def random_bits(keys: Array, n: int) -> Array:
    """Returns `n` random words under each key: keys uint32 `[rows, 2]` to uint32 `[rows, n]`."""
    # MLX's random bits are not public, but `split` returns them: two words per key
    draw = mx.vmap(lambda key: mx.random.split(key, (n + 1) // 2))
    return draw(keys).reshape(keys.shape[0], -1)[:, :n]


def random_uniform(keys: Array, n: int) -> Array:
    """Returns uniform variates in [0, 1) under each key: keys uint32 `[..., 2]` to fp32 `[..., n]`."""
    draw = mx.vmap(lambda key: mx.random.uniform(shape=(n,), key=key))
    return draw(keys.reshape(-1, 2)).reshape(*keys.shape[:-1], n)


def generator_state() -> Array:
    """Returns the state of MLX's own generator. A draw replaces the array, also in a function that is traced."""
    state: Array = mx.random.state[0]  # type: ignore[index]
    return state
