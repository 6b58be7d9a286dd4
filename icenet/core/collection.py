"""Python's collector of cycles, while modules are imported."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Stops the collector meanwhile, and makes the new objects old ones, as those of imported modules stay.

    Otherwise it reads them again and again. Processor time of collections: 0.4 s until the first token of a GPT-2 of
    124M on PyTorch, and a tenth of the start of a command.
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
