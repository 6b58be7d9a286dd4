"""Imports of large packages: what Python leaves until they are done."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disables the cyclic collector, and moves the objects of modules imported meanwhile to its oldest generation.

    They stay, and the collector would read them again and again, which is a part of the time until a command shows
    something.
    """
    was_enabled, num_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        # objects that the program has frozen stay so; the count reads them all: 10 ms for those of both frameworks
        if len(sys.modules) != num_modules and gc.get_freeze_count() == 0:
            gc.freeze()
            gc.unfreeze()  # moves them to the oldest generation without reading them
        if was_enabled:
            gc.enable()


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
