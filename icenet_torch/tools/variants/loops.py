"""Loops of another number of iterations: `range` is another one in the code of a user's module."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from icenet_torch.tools.variants.variant import Site

_TORCH, _OWN = str(Path(torch.__file__).parent), str(Path(__file__).parents[2])


class Loop(NamedTuple):
    """A call of `range` in the code of a user, and the number of its iterations."""

    site: Site
    length: int


class _Globals(TorchFunctionMode):
    """Collects the global names of the code that calls PyTorch, up to the first frame of IceNet."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, dict[str, Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(_OWN) and frame.f_code.co_name != "__torch_function__":
                break
            if not name.startswith((_OWN, _TORCH)):
                self.found[id(frame.f_globals)] = frame.f_globals
            frame = frame.f_back
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def globals_used() -> Iterator[dict[int, dict[str, Any]]]:
    """Yields the global names of all code of users that calls PyTorch in the context, by id."""
    with _Globals() as mode:
        yield mode.found


@contextlib.contextmanager
def loops(names: dict[int, dict[str, Any]], only: Site | None = None, count: int = 0) -> Iterator[list[Loop]]:
    """Yields a list to which the loops over `range` are added while the context is open.

    Args:
        names: What `globals_used` found.
        only, count: The loop whose number of iterations is changed, and the number; None to change none.
    """
    found: list[Loop] = []

    def counted(*args: Any) -> range:
        numbers, frame = range(*args), sys._getframe(1)
        site = frame.f_code.co_filename, frame.f_code.co_firstlineno, frame.f_lasti
        found.append(Loop(site, len(numbers)))
        changed = range(numbers.start, numbers.start + count * numbers.step, numbers.step)
        return changed if site == only else numbers

    without = [own for own in names.values() if "range" not in own]
    try:
        for own in without:
            own["range"] = counted
        yield found
    finally:
        for own in without:
            del own["range"]
