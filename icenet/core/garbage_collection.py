"""Python's cyclic garbage collector, which is off while modules are imported."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disables the collector, and moves the objects made meanwhile to its oldest generation.

    Those of imported modules stay, and the collector would read them again and again, which is a part of the time
    until a command shows something.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:  # objects that the program has frozen stay so
            gc.freeze()
            gc.unfreeze()  # moves them to the oldest generation without reading them
        if was_enabled:
            gc.enable()
