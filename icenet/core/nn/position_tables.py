"""Tables of positions whose rows are made when they are first needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST = 4096
"""Number of rows that a table has at least, if its model can use them."""


class TableBase(ABC):
    """A table with one row for each position, on the device of the model.

    A table for 131,072 tokens and heads of 128 would take 67 MB and a second, and most sequences are shorter. So its
    rows are computed on the host as far as they are needed. `reserve` does this before they are looked up, so that a
    step that is captured reads an array that stays the same.

    Args:
        make: Returns the rows from one index to another, float32 `[stop - start, ...]`.
        limit: Number of rows that can be needed.

    Attributes:
        array: The rows, a native array; None before the first call of `reserve`.
        count: Number of rows.
    """

    def __init__(self, make: Callable[[int, int], NDArray[np.float32]], limit: int) -> None:
        self._make, self._limit = make, limit
        self.array: Any = None
        self.count = 0

    def reserve(self, count: int) -> None:
        """Makes the rows up to `count`: 4,096 at first, and at least twice as many each time."""
        if count > self.count:
            self._grow(min(max(count, LEAST, 2 * self.count), self._limit))

    def _grow(self, count: int) -> None:
        rows = [self._make(start, min(start + LEAST, count)) for start in range(self.count, count, LEAST)]
        self.array, self.count = self._joined(rows), count

    @abstractmethod
    def _joined(self, rows: list[NDArray[np.float32]]) -> Any:
        """Returns the present rows and further ones as a native array."""

    @abstractmethod
    def __getitem__(self, index: Any) -> Any:
        """Returns rows by index, a native int array."""
