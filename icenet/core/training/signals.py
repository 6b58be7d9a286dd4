"""Ctrl-C, SIGTERM and SIGHUP: they end a run after the current step, and any other work cleanly.

SIGHUP is sent when a terminal is closed. It stays ignored where it is ignored already, as under `nohup`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from icenet.core.errors import IceNetError

_HANGUP = getattr(signal, "SIGHUP", None)
"""None on Windows."""
_REPEAT_SECONDS = 1.0
"""Within this time a second Ctrl-C is the same request: a terminal and a launcher may both send it."""


class Interrupted(IceNetError):
    """A signal stopped work whose results were kept.

    Args:
        name: The signal: `Ctrl-C`, `SIGTERM` or `SIGHUP`.
        rest: What was kept, and how to continue.
    """

    def __init__(self, name: str, rest: str) -> None:
        super().__init__(f"stopped by {name}{rest}")
        self.name = name
        self.exit_code = 130 if name == "Ctrl-C" else 1  # 130: as shells report it


class Stopped(BaseException):
    """SIGTERM or SIGHUP ended the work. Its text is the name of the signal.

    Not an `Exception`, like KeyboardInterrupt, so that no handler of errors catches it.
    """


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Raises Stopped at SIGTERM and SIGHUP during the block, so that temporary files are removed.

    A second SIGTERM has its usual effect; a second SIGHUP has none, because a terminal and a shell may both send it.
    Handlers of the surrounding program stay. Outside of the main thread this does nothing.
    """
    chosen = [number for number in (signal.SIGTERM, _HANGUP) if number is not None]
    is_main_thread = threading.current_thread() is threading.main_thread()
    chosen = [number for number in chosen if is_main_thread and signal.getsignal(number) == signal.SIG_DFL]
    for number in chosen:
        signal.signal(number, _raise_stopped)
    try:
        yield
    finally:
        for number in chosen:
            signal.signal(number, signal.SIG_DFL)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN if number == _HANGUP else signal.SIG_DFL)
    raise Stopped(signal.Signals(number).name)


@contextlib.contextmanager
def on_stop_signal(request_stop: Callable[[str], None]) -> Iterator[None]:
    """Calls `request_stop` with the name of the signal at Ctrl-C, SIGTERM and SIGHUP during the block.

    A second Ctrl-C ends the process. Further SIGTERM and SIGHUP have no effect, so that the step is still saved if a
    launcher and its process group, or a terminal and a shell, each send one. Outside of the main thread, where Python
    allows no signal handlers, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted_at: float | None = None

    def handle(number: int, frame: Any) -> None:
        nonlocal interrupted_at
        if number != signal.SIGINT:
            request_stop(signal.Signals(number).name)
        elif interrupted_at is None:
            interrupted_at = time.monotonic()
            request_stop("Ctrl-C")
        elif time.monotonic() - interrupted_at > _REPEAT_SECONDS:
            signal.signal(number, previous[signal.SIGINT])
            signal.raise_signal(number)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if _HANGUP is not None and (earlier := signal.getsignal(_HANGUP)) not in (signal.SIG_IGN, None):
        previous[_HANGUP] = earlier
    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
