"""Ctrl-C and SIGTERM, which end a run after the step in hand."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def stopping(ask: Callable[[str], None]) -> Iterator[None]:
    """While it is open, `ask` hears the name of the first Ctrl-C or SIGTERM; a second ends the run at once.

    A checkpoint that is being written is waited for all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, previous[signal.Signals(number)])
        ask("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
