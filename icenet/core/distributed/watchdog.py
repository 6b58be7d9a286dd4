"""Ends a process that waits for others that are gone."""

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
    """Ends this process where it is asked to stop but waits for others that are gone.

    A launcher asks the others to stop when one process fails. Python's signal handlers run between two of its own
    instructions, hence never while a framework waits for the network, and MLX's ring can wait forever once a
    connection broke. So a thread hears of the signal too, and gives the loop ten times its longest beat so far.

        with Watchdog(process_group, run) as watch:
            watch.beat()                # at every step
            with watch.resting(): ...   # a wait that may take long and cannot hang
    """

    least_seconds = 20.0

    def __init__(self, process_group: ProcessGroup, run: Path) -> None:
        self.process_group = process_group
        self.run = run
        self._last = time.monotonic()
        self._longest = 0.0
        self._resting = False
        self._works = process_group.size > 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        if self._works:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._works:
            signal.set_wakeup_fd(self._before)
            os.close(self._writer)  # which ends the thread

    def beat(self) -> None:
        """The loop goes on."""
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """A time in which nothing is expected."""
        self._resting = True
        try:
            yield
        finally:
            self._resting = False
            self._last = time.monotonic()

    def _listen(self) -> None:
        try:
            if not os.read(self._reader, 1):
                return
            asked = time.monotonic()
            while True:
                patience = max(self.least_seconds, 10 * self._longest)
                left = patience if self._resting else max(self._last, asked) + patience - time.monotonic()
                if left <= 0:
                    break
                if select.select([self._reader], [], [], left)[0] and not os.read(self._reader, 64):
                    return
        finally:
            os.close(self._reader)
        print(
            f"icenet: process {self.process_group.rank} was asked to stop and ends: the other processes "
            "do not answer. "
            f"To go on from the last checkpoint: --resume {self.run}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
