"""Ends a process that was requested to stop but waits for lost processes."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from icenet.core.distributed.processes import ProcessGroup


class Watchdog:
    """Ends this process after a stop signal if the training loop makes no progress.

    When one process fails, the launcher sends a signal to the others. Python runs signal handlers only between two
    of its own instructions, never while a framework waits for the network, and MLX's ring can wait forever on a
    broken connection. Therefore a thread reads the signal, too. From then on the process ends if the time since the
    last `beat` exceeds `min_seconds` and ten times the longest interval between two beats.

        with Watchdog(process_group, run) as watchdog:
            watchdog.beat()                   # at every step
            with watchdog.paused(): ...       # a wait that may be long and cannot hang

    Args:
        process_group: The processes. The watchdog does nothing in a group of one, or outside of the main thread.
        run: The run's folder, named in the message.
    """

    min_seconds = 20.0

    def __init__(self, process_group: ProcessGroup, run: Path) -> None:
        self.process_group = process_group
        self.run = run
        self._last_beat = time.monotonic()
        self._longest_interval = 0.0
        self._paused = False
        self._enabled = process_group.size > 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Watchdog:
        self._last_beat = time.monotonic()
        if self._enabled:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._writer)  # ends the thread

    def beat(self) -> None:
        """Records that the training loop makes progress."""
        now = time.monotonic()
        self._longest_interval, self._last_beat = max(self._longest_interval, now - self._last_beat), now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Suspends the watchdog during the block."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
            self._last_beat = time.monotonic()

    def _listen(self) -> None:
        """Waits for a signal, then for the end of the loop or of the process."""
        try:
            if not os.read(self._reader, 1):
                return
            signalled = time.monotonic()
            while True:
                timeout = max(self.min_seconds, 10 * self._longest_interval)
                left = timeout if self._paused else max(self._last_beat, signalled) + timeout - time.monotonic()
                if left <= 0:
                    break
                if select.select([self._reader], [], [], left)[0] and not os.read(self._reader, 64):
                    return
        finally:
            os.close(self._reader)
        print(
            f"icenet: process {self.process_group.rank} was requested to stop and ends, because the other processes "
            f"do not respond. To continue from the last checkpoint: --resume {self.run}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
