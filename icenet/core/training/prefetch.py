"""The batch of the next step, computed in a thread while the device computes this one."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from icenet.core.engine import Batch


class Prefetch:
    """Batches of steps in ascending order. An error is raised where the batch is requested.

        with Prefetch(read, end) as batches:
            batches.batch(step)

    Args:
        read: Returns the batch of a step. It uses numpy and files only, because an array of MLX cannot be evaluated
            in another thread than the one that created it.
        end: The step after the last one; no batch from it on is read.
        in_thread: Whether to read ahead. Classes of a user may be no functions of the step, or use a framework.

    Attributes:
        waited: Seconds that the last call of `batch` took to have its batch.
    """

    def __init__(self, read: Callable[[int], Batch], end: int, in_thread: bool = True) -> None:
        self._read, self._end = read, end
        self._pool = ThreadPoolExecutor(1, "icenet-data") if in_thread else None
        self._next: tuple[int, Future[Batch]] | None = None
        self.waited = 0.0

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step."""
        begin = time.perf_counter()
        planned, self._next = self._next, None
        batch = planned[1].result() if planned is not None and planned[0] == step else self._read(step)
        self.waited = time.perf_counter() - begin
        if self._pool is not None and step + 1 < self._end:
            self._next = step + 1, self._pool.submit(self._read, step + 1)
        return batch

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
