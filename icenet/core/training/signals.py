"""Ctrl-C and SIGTERM: they end a run after the current step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def on_stop_signal(request_stop: Callable[[str], None]) -> Iterator[None]:
    """Calls `request_stop` with the name of the signal at the first Ctrl-C or SIGTERM during the block.

    A second one has its usual effect, which ends the process. Outside of the main thread, where Python allows no
    signal handlers, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        signal.signal(number, previous[signal.Signals(number)])
        request_stop("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
