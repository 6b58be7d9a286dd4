"""The cache of a transformer, MLX: keys and values of all layers in buffers of fixed size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np

from icenet.core.config.transformer_plan import AttentionPlan
from icenet.core.generation.cache import KVCacheBase, LayerCacheBase, Pick
from icenet.nn.arrays import on_cpu
from icenet.nn.attention import Mask, make_attention_mask, rotate, scaled_dot_product_attention
from icenet.nn.cached_attention import cached_attention, has_cached_attention, in_device_memory, joined_attention


class KVCache(KVCacheBase):
    """See `icenet.core.generation.cache.KVCacheBase`."""

    arrange = KVCacheBase.arrange  # a class with more arrays has its own (see `batching.rows_that_join`)
    device_position: mx.array
    """`position` for kernels. Set where a captured step reads the buffers in place."""

    def __init__(self, num_layers: int, prepare: Callable[[int], None] | None = None) -> None:
        super().__init__(num_layers, mx.zeros((1,), mx.int32), prepare)

    def make_layer(self, keys: mx.array | None = None, values: mx.array | None = None) -> LayerCache:
        return LayerCache(self, keys, values)

    def without_arrays(self) -> KVCache:
        """Returns a cache without buffers that makes the same captured caches, for a step that is traced."""
        other = copy.copy(self)
        other._prepare = None
        other.layers = [other.make_layer() for _ in self.layers]
        return other

    def begin(
        self, input_ids: mx.array, attention_mask: mx.array | None, windows: Iterable[int | None] = (None,)
    ) -> tuple[mx.array, dict[int | None, Mask]]:
        """Begins to read tokens; `end` ends it.

        Args:
            input_ids: `[B, T]`.
            attention_mask: Mask whose last T columns are those of the tokens, `[B, S]`, or None if they have no
                padding. Its padding is on the left.
            windows: Numbers of tokens that a token attends to; None for all.

        Returns:
            The position of each token in its row, int32 `[T]` or `[B, T]`, and the mask of each window for
            `scaled_dot_product_attention`.
        """
        length = input_ids.shape[1]
        if attention_mask is not None:
            padding = (attention_mask[:, -length:] == 0).sum(axis=1).astype(mx.int32)
            self.padding = padding if self.padding is None else self.padding + padding
        if self.length is not None:
            self.reserve(length)
        columns = self.position[:, None]  # [1, T] or [B, T]
        if length > 1:  # a step of one token has fewer kernels
            columns = columns + mx.arange(length)
        positions = columns if self.padding is None else mx.maximum(columns - self.padding[:, None], 0)
        if self.reads_in_place(length):
            self.device_position = in_device_memory(self.position)
            return positions, dict.fromkeys(windows)
        # in a captured step, all columns of the buffers are keys
        count = self.capacity if self.length is None else self.length + length
        is_token = None
        if self.padding is not None:
            is_token = mx.arange(count) >= self.padding[:, None]
        elif self.length is None or len(self.position) > 1 or any(w is not None and w < count for w in windows):
            is_token = mx.ones((1, count), mx.bool_)
        return positions, {window: make_attention_mask(is_token, columns, True, window) for window in windows}

    def reads_in_place(self, length: int) -> bool:
        buffer = self.layers[0].keys
        return self.length is None and buffer is not None and has_cached_attention(buffer, length)

    def truncate(self, length: int) -> None:
        """Keeps the first `length` columns of each row. The following ones are written over."""
        self.position = mx.array(np.full(self.position.shape, length, np.int32))  # not lazy
        self.length = length


class LayerCache(LayerCacheBase):
    """See `icenet.core.generation.cache.LayerCacheBase`."""

    _cache: KVCache
    keys: mx.array | None
    values: mx.array | None

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stores keys and values of T columns, `[B, H, T, D/H]` each. Returns those that the mask describes."""
        length, capacity, position = self._cache.length, self._cache.capacity, self._cache.position
        if self.keys is None or self.values is None:
            # attention to the new columns themselves does not wait for the buffers
            self.keys, self.values = _buffer(keys, capacity), _buffer(values, capacity)
            return keys, values
        first = length if len(position) == 1 else None
        self.keys = _write(self.keys, keys, position, first)
        self.values = _write(self.values, values, position, first)
        if length is None:
            return self.keys, self.values
        stop = length + keys.shape[2]
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, mask: Mask, angles: mx.array | None, plan: AttentionPlan
    ) -> mx.array:
        """Rotates queries and keys of T columns, stores keys and values, and attends to all columns.

        Args:
            q: Queries, `[B, H, T, E]`.
            k, v: Keys and values, `[B, K, T, E]`.
            mask: See `scaled_dot_product_attention`.
            angles: See `rotate`; None without rotary positions.
            plan: The options of the layer.

        Returns:
            `[B, H, T, E]`.
        """
        cache = self._cache
        if cache.reads_in_place(q.shape[2]):
            assert self.keys is not None and self.values is not None
            return cached_attention(
                q, k, v, self.keys, self.values, cache.device_position, cache.padding, angles, plan
            )
        if angles is not None:
            q, k = _rotate(q, k, angles, plan.rotary_pairs)
        keys, values = self.append(k, v)
        return scaled_dot_product_attention(q, keys, values, mask, plan.scale, plan.softcap)

    def attend_joined(self, qkv: mx.array, angles: mx.array | None, plan: AttentionPlan) -> mx.array:
        """Does what `attend` does, where the cache is read in place.

        Args:
            qkv: Queries, keys and values side by side, `[B, 1, (H + 2 K) E]`.
            angles, plan: See `attend`.

        Returns:
            `[B, 1, H * E]`.
        """
        cache = self._cache
        assert self.keys is not None and self.values is not None
        return joined_attention(qkv, self.keys, self.values, cache.device_position, cache.padding, angles, plan)

    def grow(self, capacity: int) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (_buffer(array, capacity) for array in (self.keys, self.values))
            mx.eval(self.keys, self.values)  # frees the smaller buffers

    def arrange(self, rows: Sequence[int], pick: Pick) -> None:
        self.keys, self.values = pick([self.keys], rows), pick([self.values], rows)
        mx.eval(self.keys, self.values)  # frees the buffers before

    @staticmethod
    def replaced(buffer: mx.array, new: mx.array, rows: Sequence[int]) -> mx.array:
        """Returns the buffer with other rows, whose first columns are `new`.

        Neighbouring rows are written together. A scatter of all rows takes five times as long on a CPU.
        """
        first = 0
        for last in range(len(rows)):
            if last + 1 == len(rows) or rows[last + 1] != rows[last] + 1:
                buffer = mx.slice_update(buffer, new[first : last + 1], mx.array([rows[first]]), axes=(0,))
                first = last + 1
        return buffer


def _rotate(q: mx.array, k: mx.array, angles: mx.array, pairs: str) -> list[mx.array]:
    """Rotates queries and keys. On a CPU, those of one token are rotated together, by half as many operations."""
    if q.shape[2] > 1 or not on_cpu():
        return [rotate(q, angles, pairs), rotate(k, angles, pairs)]
    return list(mx.split(rotate(mx.concatenate([q, k], axis=1), angles, pairs), [q.shape[1]], axis=1))


def _buffer(first: mx.array, capacity: int) -> mx.array:
    """Returns a buffer for `capacity` columns of keys or values, which begins with the given ones."""
    batch, heads, columns, size = first.shape
    if columns == capacity:
        return mx.contiguous(first)
    return mx.concatenate([first, mx.zeros((batch, heads, capacity - columns, size), first.dtype)], axis=2)


def _write(buffer: mx.array, new: mx.array, position: mx.array, first: int | None) -> mx.array:
    """Returns the buffer with new columns. MLX writes in place if nothing else refers to it.

    Args:
        buffer: `[B, H, capacity, D/H]`.
        new: Keys or values, `[B, H, T, D/H]`.
        position: Place of the first column, int32 `[1]` or `[B]`.
        first: The same, if the host knows it and it is that of all rows: a slice needs fewer kernels.
    """
    if first is not None:
        buffer = copy.copy(buffer)  # the array that the state of an earlier step may have stays as it is
        buffer[:, :, first : first + new.shape[2]] = new
        return buffer
    if new.shape[2] > 1:
        return mx.slice_update(buffer, new, position, axes=(2,))
    return mx.put_along_axis(buffer, mx.broadcast_to(position.reshape(-1, 1, 1, 1), new.shape), new, axis=2)
