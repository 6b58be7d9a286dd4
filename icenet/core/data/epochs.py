"""The order of the rows of a data set: a function of the seed and the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from icenet.core import rng
from icenet.core.errors import DataError


class Epochs:
    """The training rows of each step. An epoch contains each row once, in an order drawn from (seed, epoch) alone.

    A resumed run, the other backend and every process see the same rows. A checkpoint stores nothing but the step.
    The rows at the end of an epoch that do not fill a batch are dropped.
    """

    def __init__(self, num_rows: int, seed: int, too_few: Callable[[int], str]) -> None:
        """
        Args:
            num_rows: Number of training rows.
            seed: Seed of the order.
            too_few: Returns the error message for a batch size that is larger than the number of rows.
        """
        self.num_rows = num_rows
        self._seed = seed
        self._too_few = too_few
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def steps(self, batch_size: int) -> int:
        """Returns the number of batches in an epoch.

        Raises:
            DataError: The number is zero.
        """
        if batch_size < 1:
            raise DataError(f"training.batch_size must be at least 1, not {batch_size}")
        steps = self.num_rows // batch_size
        if steps == 0:
            raise DataError(self._too_few(batch_size))
        return steps

    def rows(self, step: int, batch_size: int) -> tuple[int, NDArray[np.int64]]:
        """Returns the epoch of a step, and the indices of its rows, int64 `[batch_size]`.

        Args:
            step: The step, counted from 0.
            batch_size: Rows in a batch.

        Raises:
            DataError: There are fewer rows than a batch has.
        """
        if step < 0:
            raise ValueError(f"steps are counted from 0, not {step}")
        epoch, index = divmod(step, self.steps(batch_size))
        order = self._order  # read once: another thread may prefetch
        if order is None or order[0] != epoch:
            order = self._order = (epoch, rng.permutation(rng.key(self._seed, "data", epoch), self.num_rows))
        return epoch, order[1][index * batch_size : (index + 1) * batch_size]


def validation_rows(num_rows: int, batch_size: int, count: int | None = None) -> Iterator[NDArray[np.int64]]:
    """Yields the indices of the validation rows of each batch, the same in every call; the last may be smaller.

    Args:
        num_rows: Number of validation rows.
        batch_size: Rows in a batch.
        count: Maximum number of batches, whose rows are spread evenly over the validation rows. None: all.
    """
    taken = num_rows if count is None else min(num_rows, count * batch_size)
    chosen = np.arange(taken, dtype=np.int64) * num_rows // max(taken, 1)
    for first in range(0, taken, batch_size):
        yield chosen[first : first + batch_size]
