"""Caches of the tokens read so far, MLX: keys and values of attention."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx


class KVCache:
    """Keys and values of one attention layer, in buffers that grow by `step` positions.

    Attributes:
        length: Number of positions stored.
        capacity: Number of positions that the buffers can hold.
        keys: Buffer `[B, H, capacity, D/H]`.
        values: Buffer `[B, H, capacity, D/H]`.
    """

    step = 256
    keys: mx.array
    values: mx.array

    def __init__(self) -> None:
        self.capacity = 0
        self.length = 0

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Adds keys and values of T positions, `[B, H, T, D/H]` each. Returns those of all positions."""
        start, self.length = self.length, self.length + keys.shape[2]
        if self.length > self.capacity:
            batch, heads, _, head_size = keys.shape
            self.capacity = -(-self.length // self.step) * self.step
            empty = mx.zeros((batch, heads, self.capacity - start, head_size), keys.dtype)
            stored = (self.keys, self.values) if start else (keys, values)
            self.keys, self.values = (mx.concatenate([array[:, :, :start], empty], axis=2) for array in stored)
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]
