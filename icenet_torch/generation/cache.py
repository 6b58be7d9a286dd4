"""The cache of a transformer, PyTorch: keys and values of all layers in buffers of fixed size."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from icenet.core.generation.cache import Cache
from icenet_torch.nn.attention import Mask, make_attention_mask


class KVCache(Cache):
    """Keys and values of the attention layers of a model.

    The buffers have room for `capacity` columns. They double when they are full, and `reserve` can make room before.

    Args:
        num_layers: Number of attention layers.
        prepare: Called with the number of columns when the buffers grow.

    Attributes:
        layers: The cache of each layer.
        capacity: Number of columns that the buffers can hold.
        position: Number of columns stored, int32 `[]`: the place of the next one.
        padding: Number of columns of padding on the left of each row, int32 `[B]`; None without padding.
        row_lengths: Number of tokens of each row when its prompt has been read, int32 `[B, 1]`, while it is read in
            pieces; None if each piece is the end of the row so far. Some rotary positions depend on it.
    """

    step = 256

    def __init__(self, num_layers: int, prepare: Callable[[int], None] | None = None) -> None:
        self._prepare = prepare
        self.capacity = 0
        self.position = torch.zeros((), dtype=torch.int32, device="cpu")
        self.padding: torch.Tensor | None = None
        self.row_lengths: torch.Tensor | None = None
        self.layers = [LayerCache(self) for _ in range(num_layers)]

    @property
    def state(self) -> list[torch.Tensor]:
        padding = [] if self.padding is None else [self.padding]
        buffers = (buffer for layer in self.layers for buffer in (layer.keys, layer.values) if buffer is not None)
        return [self.position, *padding, *buffers]

    @state.setter
    def state(self, arrays: list[torch.Tensor]) -> None:
        remaining = iter(arrays)
        self.position = next(remaining)
        if self.padding is not None:
            self.padding = next(remaining)
        self.layers = [LayerCache(self, next(remaining), next(remaining)) for _ in self.layers]

    def reserve(self, columns: int) -> None:
        """Makes room for further columns, in steps of 256 and at least twice the present room."""
        assert self.length is not None
        needed = self.length + columns
        if needed > self.capacity:
            self.capacity = max(-(-needed // self.step) * self.step, 2 * self.capacity)
            for layer in self.layers:
                layer.grow(self.capacity)
            if self._prepare is not None:
                self._prepare(self.capacity)

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
        columns = self.position + torch.arange(length, device=device)
        positions = columns if self.padding is None else torch.clamp(columns - self.padding[:, None], min=0)
        # in a captured step, all columns of the buffers are keys
        count = self.capacity if self.length is None else self.length + length
        is_token = None
        if self.padding is not None:
            is_token = torch.arange(count, device=device) >= self.padding[:, None]
        elif self.length is None or any(window is not None and window < count for window in windows):
            is_token = torch.ones((1, count), dtype=torch.bool, device=device)
        return positions, {window: make_attention_mask(is_token, columns, True, window) for window in windows}

    def end(self, length: int) -> None:
        """Counts the columns that all layers have stored."""
        self.position = self.position + length
        if self.length is not None:
            self.length += length


class LayerCache:
    """Keys and values of one attention layer.

    Attributes:
        keys: Buffer `[B, H, capacity, D/H]`; None before the first column.
        values: Buffer `[B, H, capacity, D/H]`; None before the first column.
    """

    def __init__(self, cache: KVCache, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> None:
        self._cache = cache
        self.keys = keys
        self.values = values

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores keys and values of T columns, `[B, H, T, D/H]` each. Returns those that the mask describes."""
        length, capacity, position = self._cache.length, self._cache.capacity, self._cache.position
        if self.keys is None or self.values is None:
            self.keys, self.values = (_empty(array, capacity) for array in (keys, values))
        self.keys = _write(self.keys, keys, position)
        self.values = _write(self.values, values, position)
        if length is None:
            return self.keys, self.values
        stop = length + keys.shape[2]
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def grow(self, capacity: int) -> None:
        """Moves the columns to buffers with room for `capacity` columns."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (
                torch.cat([array, _empty(array, capacity - array.shape[2])], dim=2)
                for array in (self.keys, self.values)
            )


def _empty(like: torch.Tensor, columns: int) -> torch.Tensor:
    """Returns a buffer of zeros for `columns` columns of keys or values."""
    batch, heads, _, size = like.shape
    return like.new_zeros((batch, heads, columns, size))


def _write(buffer: torch.Tensor, new: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Writes new columns into the buffer from `position` on, and returns it."""
    columns = position + torch.arange(new.shape[2], device=position.device)
    return buffer.index_copy_(2, columns.long(), new)
