"""The cache of a transformer, PyTorch: keys and values of all layers in buffers of fixed size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from icenet.core.config.transformer_plan import AttentionPlan
from icenet.core.generation.cache import KVCacheBase, LayerCacheBase, Pick
from icenet_torch.nn.attention import Mask, make_attention_mask, rotate, scaled_dot_product_attention
from icenet_torch.nn.cached_attention import cached_attention, has_cached_attention, joined_attention


class KVCache(KVCacheBase):
    """See `icenet.core.generation.cache.KVCacheBase`.

    Attributes:
        columns: Places of the tokens that are read, int64 `[1, T]` or `[B, T]`.
    """

    arrange = KVCacheBase.arrange  # a class with more arrays has its own (see `batching.rows_that_join`)

    def __init__(self, num_layers: int, prepare: Callable[[int], None] | None = None) -> None:
        super().__init__(num_layers, torch.zeros(1, dtype=torch.int32, device="cpu"), prepare)
        self.columns: torch.Tensor | None = None

    def make_layer(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> LayerCache:
        return LayerCache(self, keys, values)

    def begin(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, windows: Iterable[int | None] = (None,)
    ) -> tuple[torch.Tensor, dict[int | None, Mask]]:
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
        length, device = input_ids.shape[1], input_ids.device
        self.position = self.position.to(device)
        if attention_mask is not None:
            padding = (attention_mask[:, -length:] == 0).sum(dim=1, dtype=torch.int32)
            self.padding = padding if self.padding is None else self.padding + padding
        if self.length is not None:
            self.reserve(length)
        columns = self.position[:, None]  # [1, T] or [B, T]
        if length > 1:  # a step of one token has fewer kernels
            columns = columns + torch.arange(length, device=device)
        self.columns = columns.long()
        positions = columns if self.padding is None else torch.clamp(columns - self.padding[:, None], min=0)
        if self.reads_in_place(length):
            return positions, dict.fromkeys(windows)
        # in a captured step, all columns of the buffers are keys
        count = self.capacity if self.length is None else self.length + length
        is_token = None
        if self.padding is not None:
            is_token = torch.arange(count, device=device) >= self.padding[:, None]
        elif self.length is None or len(self.position) > 1 or any(w is not None and w < count for w in windows):
            is_token = torch.ones((1, count), dtype=torch.bool, device=device)
        return positions, {window: make_attention_mask(is_token, columns, True, window) for window in windows}

    def reads_in_place(self, length: int) -> bool:
        buffer = self.layers[0].keys
        return self.length is None and buffer is not None and has_cached_attention(buffer, length)

    def truncate(self, length: int) -> None:
        """Keeps the first `length` columns of each row. The following ones are written over."""
        self.position = torch.full_like(self.position, length)
        self.length = length


class LayerCache(LayerCacheBase):
    """See `icenet.core.generation.cache.LayerCacheBase`."""

    _cache: KVCache
    keys: torch.Tensor | None
    values: torch.Tensor | None

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores keys and values of T columns, `[B, H, T, D/H]` each. Returns those that the mask describes."""
        length, capacity, columns = self._cache.length, self._cache.capacity, self._cache.columns
        if self.keys is None or self.values is None:
            self.keys, self.values = _buffer(keys, capacity), _buffer(values, capacity)
            return keys, values
        assert columns is not None
        first = length if len(columns) == 1 else None
        self.keys = _write(self.keys, keys, columns, first)
        self.values = _write(self.values, values, columns, first)
        if length is None:
            return self.keys, self.values
        stop = length + keys.shape[2]
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Mask,
        angles: torch.Tensor | None,
        plan: AttentionPlan,
    ) -> torch.Tensor:
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
            return cached_attention(q, k, v, self.keys, self.values, cache.position, cache.padding, angles, plan)
        if angles is not None:
            q, k = _rotate(q, k, angles, plan.rotary_pairs)
        keys, values = self.append(k, v)
        return scaled_dot_product_attention(q, keys, values, mask, plan.scale, plan.softcap)

    def attend_joined(self, qkv: torch.Tensor, angles: torch.Tensor | None, plan: AttentionPlan) -> torch.Tensor:
        """Does what `attend` does, where the cache is read in place.

        Args:
            qkv: Queries, keys and values side by side, `[B, 1, (H + 2 K) E]`.
            angles, plan: See `attend`.

        Returns:
            `[B, 1, H * E]`.
        """
        cache = self._cache
        assert self.keys is not None and self.values is not None
        return joined_attention(qkv, self.keys, self.values, cache.position, cache.padding, angles, plan)

    def grow(self, capacity: int) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (_buffer(array, capacity) for array in (self.keys, self.values))

    def arrange(self, rows: Sequence[int], pick: Pick) -> None:
        self.keys, self.values = pick([self.keys], rows), pick([self.values], rows)

    @staticmethod
    def replaced(buffer: torch.Tensor, new: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Writes `new` to the first columns of rows of the buffer, and returns it."""
        buffer[:, :, : new.shape[2]].index_copy_(0, torch.tensor(rows, device=buffer.device), new)
        return buffer


def _rotate(q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor, pairs: str) -> tuple[torch.Tensor, ...]:
    """Rotates queries and keys. On a CPU, those of one token are rotated together, by half as many operations."""
    if q.shape[2] > 1 or q.is_cuda:
        return rotate(q, angles, pairs), rotate(k, angles, pairs)
    return rotate(torch.cat([q, k], dim=1), angles, pairs).split([q.shape[1], k.shape[1]], dim=1)


def _buffer(first: torch.Tensor, capacity: int) -> torch.Tensor:
    """Returns a buffer for `capacity` columns of keys or values, which begins with the given ones."""
    batch, heads, columns, size = first.shape
    buffer = first.new_empty((batch, heads, capacity, size))
    buffer[:, :, :columns] = first
    buffer[:, :, columns:] = 0  # a masked column that is not finite would make the sum NaN
    return buffer


def _write(buffer: torch.Tensor, new: torch.Tensor, columns: torch.Tensor, first: int | None) -> torch.Tensor:
    """Writes new columns into the buffer and returns it.

    Args:
        buffer: `[B, H, capacity, D/H]`.
        new: Keys or values, `[B, H, T, D/H]`.
        columns: Their places, int64 `[1, T]` or `[B, T]`.
        first: The first place, if the host knows it and it is that of all rows: a copy is faster.
    """
    if first is not None:
        buffer[:, :, first : first + new.shape[2]] = new
        return buffer
    if len(columns) == 1:
        return buffer.index_copy_(2, columns[0], new)
    return buffer.scatter_(2, columns[:, None, :, None].expand_as(new), new)
