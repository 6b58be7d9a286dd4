"""Caches of the tokens that a model has read. They need no framework.

A cache of IceNet's models is a value: its arrays, `state`, determine the next step. A step that reads and returns
`state` can therefore be captured (`mx.compile`, `torch.compile`, CUDA graphs) and run again with other arrays. What
depends on the number of tokens, such as the size of buffers, is done by `reserve` on the host, before the step.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

C = TypeVar("C", bound="Cache")

Pick = Callable[[list[Any], Sequence[int]], Any]
"""Returns rows of arrays `[B, ...]`, by their places in the arrays one below the other: `DecoderBase.pick`."""


class Cache(ABC):
    """The tokens read so far, as a model needs them to read the next one. Padding is on the left.

    Attributes:
        length: Number of columns read, padding included. None in a captured step, which must not depend on it.
        limit: Number of columns that will be read at most; None if it is unknown.
        row_lengths: Number of tokens of each row when its prompt has been read, int32 `[B, 1]` on the device, while
            it is read in pieces; None if each piece is the end of the row so far. Some rotary positions depend on it.
    """

    length: int | None = 0
    limit: int | None = None
    row_lengths: Any = None

    @property
    @abstractmethod
    def state(self) -> list[Any]:
        """The arrays of the cache, in a fixed order."""

    @state.setter
    @abstractmethod
    def state(self, arrays: list[Any]) -> None: ...

    @abstractmethod
    def reserve(self, columns: int) -> None:
        """Makes room for further columns."""

    @contextlib.contextmanager
    def reading_prompts(self, columns: int, limit: int, row_lengths: Any) -> Iterator[None]:
        """A context in which prompts are read in chunks.

        It begins with room for the prompts and the first new token, because larger buffers are copies of the ones
        before.

        Args:
            columns: Number of columns of the prompts, with those that are read.
            limit, row_lengths: See the attributes.
        """
        self.limit, self.row_lengths = limit, row_lengths
        self.reserve(min(columns + 1, limit) - (self.length or 0))
        try:
            yield
        finally:
            self.row_lengths = None

    def without_arrays(self: C) -> C:
        """Returns a cache without large arrays that makes the same captured caches, for a step that is traced."""
        return copy.copy(self)

    def holding(self: C, state: list[Any]) -> C:
        """Returns a cache of the same columns with the arrays `state`."""
        other = copy.copy(self)
        other.state = state
        return other

    def captured(self: C, state: list[Any]) -> C:
        """Returns a cache with the arrays `state`, for a step that is captured: it knows no numbers of the host."""
        other = self.holding(state)
        other.length = None
        return other


class RowCache(Cache):
    """A cache whose rows can be moved, and replaced by those of another one (see `generation.batching`)."""

    reads_padding: ClassVar[bool]
    """Whether columns after the last token of a row change what is read later, so that they must be masked."""

    @abstractmethod
    def place(self, positions: Any, longest: int) -> None:
        """Sets the number of columns of each row, int32 `[B]` on the device, and the largest of them."""

    @abstractmethod
    def arrange(self: C, rows: Sequence[int], pick: Pick, other: C | None = None) -> None:
        """Keeps some rows, or replaces some. `place` must follow.

        Args:
            rows: Without `other`: the rows to keep, in their new order; a row can occur several times. With `other`:
                the new rows by their places in the two caches, one below the other. Row r of this cache stays at r,
                and the rows of the other cache keep their order.
            pick: See `Pick`.
            other: A cache with other rows.
        """


class KVCacheBase(RowCache):
    """Keys and values of the attention layers of a model.

    The buffers have room for `capacity` columns. They double when they are full, and `reserve` can make room before.

    Args:
        num_layers: Number of attention layers.
        position: Zero, int32 `[1]`.
        prepare: Called with the number of columns when the buffers grow.

    Attributes:
        layers: The cache of each layer.
        capacity: Number of columns that the buffers can hold, a multiple of `step`.
        position: Number of columns stored, which is the place of the next one: int32 `[1]`, or `[B]` if it differs
            between the rows.
        padding: Number of columns of padding on the left of each row, int32 `[B]`; None without padding.
    """

    reads_padding = False  # a token attends to earlier columns only, and later ones are written over
    step = 256

    def __init__(self, num_layers: int, position: Any, prepare: Callable[[int], None] | None) -> None:
        self._prepare = prepare
        self.capacity = 0
        self.position = position
        self.padding: Any = None
        self.layers: list[Any] = [self.make_layer() for _ in range(num_layers)]

    @abstractmethod
    def make_layer(self, keys: Any = None, values: Any = None) -> LayerCacheBase:
        """Returns the cache of one layer with these buffers."""

    @abstractmethod
    def reads_in_place(self, length: int) -> bool:
        """Returns whether a captured step of `length` tokens attends to the buffers themselves, without a mask."""

    @property
    def state(self) -> list[Any]:
        padding = [] if self.padding is None else [self.padding]
        buffers = (buffer for layer in self.layers for buffer in (layer.keys, layer.values) if buffer is not None)
        return [self.position, *padding, *buffers]

    @state.setter
    def state(self, arrays: list[Any]) -> None:
        remaining = iter(arrays)
        self.position = next(remaining)
        if self.padding is not None:
            self.padding = next(remaining)
        self.layers = [self.make_layer(next(remaining), next(remaining)) for _ in self.layers]

    def reserve(self, columns: int) -> None:
        """Makes room for further columns: at least twice the present room, but not for more than `limit`."""
        assert self.length is not None
        needed = self.length + columns
        if needed > self.capacity:
            doubled = 2 * self.capacity if self.limit is None else min(2 * self.capacity, self.limit)
            self.capacity = -(-max(needed, doubled) // self.step) * self.step
            for layer in self.layers:
                layer.grow(self.capacity)
            if self._prepare is not None:
                self._prepare(self.capacity)

    def place(self, positions: Any, longest: int) -> None:
        self.position, self.length = positions, longest

    def arrange(self, rows: Sequence[int], pick: Pick, other: KVCacheBase | None = None) -> None:
        assert self.padding is None and self.length is not None
        if other is None:
            for layer in self.layers:
                layer.arrange(rows, pick)
            return
        assert other.padding is None and other.length is not None
        self.length = max(self.length, other.length)
        self.reserve(0)
        replaced = [row for row, source in enumerate(rows) if source != row]
        for layer, new in zip(self.layers, other.layers, strict=True):
            layer.replace(replaced, new, other.length)

    def end(self, length: int) -> None:
        """Counts the columns that all layers have stored."""
        self.position = self.position + length
        if self.length is not None:
            self.length += length


class LayerCacheBase(ABC):
    """Keys and values of one attention layer.

    Attributes:
        keys: Buffer `[B, H, capacity, D/H]`; None before the first column.
        values: Buffer `[B, H, capacity, D/H]`; None before the first column.
    """

    def __init__(self, cache: Any, keys: Any = None, values: Any = None) -> None:
        # a reference would make a cycle, and the buffers of each step would wait for the garbage collector
        self._cache: Any = weakref.proxy(cache)
        self.keys = keys
        self.values = values

    @property
    def is_captured(self) -> bool:
        """Whether it is that of a captured step."""
        return self._cache.length is None

    def reads_in_place(self, length: int) -> bool:
        """See `KVCacheBase.reads_in_place`."""
        return bool(self._cache.reads_in_place(length))

    @abstractmethod
    def grow(self, capacity: int) -> None:
        """Moves the columns to buffers with room for `capacity` columns."""

    @abstractmethod
    def arrange(self, rows: Sequence[int], pick: Pick) -> None:
        """Keeps rows, in their new order."""

    def replace(self, rows: Sequence[int], new: LayerCacheBase, columns: int) -> None:
        """Replaces the first columns of rows by those of the rows of another cache."""
        self.keys = self.replaced(self.keys, new.keys[:, :, :columns], rows)
        self.values = self.replaced(self.values, new.values[:, :, :columns], rows)

    @staticmethod
    @abstractmethod
    def replaced(buffer: Any, new: Any, rows: Sequence[int]) -> Any:
        """Returns a buffer whose rows begin with the columns `new`, `[N, H, T, D/H]`. It may be the same array."""


class RecurrentCache(RowCache):
    """The state of each recurrent layer after the last token, `[directions, B, H]`; None before the first one."""

    reads_padding = True

    def __init__(self) -> None:
        self.states: list[tuple[Any, ...]] | None = None

    @property
    def state(self) -> list[Any]:
        return [array for layer in self.states or [] for array in layer]

    @state.setter
    def state(self, arrays: list[Any]) -> None:
        remaining = iter(arrays)
        self.states = [tuple(next(remaining) for _ in layer) for layer in self.states or []]

    def reserve(self, columns: int) -> None:
        """Does nothing: the states have a fixed size."""

    def place(self, positions: Any, longest: int) -> None:
        """Does nothing: the states do not depend on positions."""

    def arrange(self, rows: Sequence[int], pick: Pick, other: RecurrentCache | None = None) -> None:
        parts = [self.state] if other is None else [self.state, other.state]
        by_row = ([array.swapaxes(0, 1) for array in arrays] for arrays in zip(*parts, strict=True))  # [D, B, H]
        self.state = [pick(arrays, rows).swapaxes(0, 1) for arrays in by_row]
