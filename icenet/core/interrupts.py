"""Ctrl-C during work that must not be cut."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Raises the KeyboardInterrupt of a Ctrl-C during the block at its end.

    It is for code that an exception of Python ends with the process, such as the start of a C++ library. Handlers of
    the surrounding program stay. Outside of the main thread this does nothing.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    requests: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: requests.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if requests:
        raise KeyboardInterrupt
