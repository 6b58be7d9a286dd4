"""Work in a background thread, such as writing a checkpoint while training continues."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """Runs one task at a time in a thread. An error of the task is raised in the caller's thread.

        with Background() as background:
            background.start(write)      # waits for the previous task
            background.check()           # raises the error of the task if it has failed

    Leaving the block waits for the task and raises its error, unless another error is being raised. A task must use
    numpy and files only, because an array of MLX cannot be evaluated in another thread than the one that created it.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "icenet")
        self._task: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether there is a task whose result was not collected by `check` or `wait`."""
        return self._task is not None

    def start(self, task: Callable[[], None]) -> None:
        """Waits for the previous task and starts another."""
        self.wait()
        self._task = self._pool.submit(task)

    def check(self) -> None:
        """Raises the error of the task if it has finished with one. Does not wait."""
        if self._task is not None and self._task.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the task and raises its error."""
        task, self._task = self._task, None
        if task is not None:
            task.result()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with contextlib.nullcontext() if error is None else contextlib.suppress(Exception):
                self.wait()
        finally:
            self._pool.shutdown()
