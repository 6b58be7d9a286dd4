"""Caches of the tokens that a model has read. They need no framework.

A cache of IceNet's models is a value: its arrays, `state`, determine the next step. A step that reads and returns
`state` can therefore be captured (`mx.compile`, `torch.compile`, CUDA graphs) and run again with other arrays. What
depends on the number of tokens, such as the size of buffers, is done by `reserve` on the host, before the step.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, TypeVar

C = TypeVar("C", bound="Cache")


class Cache(ABC):
    """The tokens read so far, as a model needs them to read the next one. Padding is on the left.

    Attributes:
        length: Number of columns read, padding included. None in a captured step, which must not depend on it.
    """

    length: int | None = 0

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

    def captured(self: C, state: list[Any]) -> C:
        """Returns a cache with the arrays `state`, for a step that is captured: it knows no numbers of the host."""
        other = copy.copy(self)
        other.state, other.length = state, None
        return other


class RecurrentCache(Cache):
    """The state of each recurrent layer after the last token; None before the first one."""

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
