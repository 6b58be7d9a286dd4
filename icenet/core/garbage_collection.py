"""Python's cyclic garbage collector, which is off while modules are imported."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disables the collector, and moves the objects of modules imported meanwhile to its oldest generation.

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
