"""Work that a training loop need not wait for: one thing at a time, in a thread, its error told later."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """Runs one piece of work in a thread while the caller goes on.

        with Background() as background:
            background.start(write)      # waits for what was started before
            background.check()           # raises what the work raised, if it is over

    Leaving it waits, and raises too, unless another error is on its way out. The work must touch numpy and files
    only: an array of MLX cannot be evaluated in another thread.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "icenet")
        self._work: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether there is work that nobody has waited for."""
        return self._work is not None

    def start(self, work: Callable[[], None]) -> None:
        """Begins a piece of work, after the one before."""
        self.wait()
        self._work = self._pool.submit(work)

    def check(self) -> None:
        """Raises what the work raised, if it is over."""
        if self._work is not None and self._work.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the work, and raises what it raised."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

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
