"""Variants of functions, and the context that applies one of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

_TORCH = str(Path(torch.__file__).parent)
Site = tuple[str, int, int]
"""Where the code of a module calls a function: file, line of the code object, and instruction."""
Run = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Called as `run(function, args, kwargs)` in place of `function(*args, **kwargs)`."""


@dataclass(frozen=True)
class Variant:
    """A change of the functions that a module calls.

    Attributes:
        text: What is different in the module under test, in one line.
        names: Names of the functions that it changes.
        run: Computes the variant of a call; returns NotImplemented for a call that it does not change.
    """

    text: str
    names: frozenset[str]
    run: Run


def arguments(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call by name. `names` are those of the positional ones."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def name_of(func: Any) -> str:
    """Returns the name of a function without underscores: `add` for a method, an operator and the function."""
    return str(getattr(func, "__name__", func)).strip("_")


def left_out(func: Any, args: Any, kwargs: Any) -> Any:
    """The variant that returns the input of a function."""
    return (args[0] if args else kwargs["input"]).clone()


def equal_axes(x: torch.Tensor) -> tuple[int, int] | None:
    """Returns two neighbouring axes of the same size, above 1, the last ones first; None without."""
    return next(((i - 1, i) for i in range(x.ndim - 1, 0, -1) if x.shape[i] == x.shape[i - 1] > 1), None)


class FunctionCall(NamedTuple):
    """A call of a function: its name, its arguments as far as they are numbers, flags and texts, and its site."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    site: Site


@contextlib.contextmanager
def applied(variant: Variant, only: Collection[Site] | None = None) -> Iterator[Applied]:
    """Applies a variant to all calls of its functions, or to those of some sites, while the context is open."""
    with Applied(variant, only) as mode:
        yield mode


@contextlib.contextmanager
def spying() -> Iterator[list[FunctionCall]]:
    """Yields a list to which each call of a function is added."""
    calls: list[FunctionCall] = []
    with _Spy(calls):
        yield calls


class _Spy(TorchFunctionMode):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain = tuple(map(_plain, args)), {k: _plain(v) for k, v in kwargs.items()}
        self._calls.append(FunctionCall(name_of(func), *plain, _site()))
        return func(*args, **kwargs)


class Applied(TorchFunctionMode):
    """The mode in which functions are replaced.

    Attributes:
        sites: Where it has replaced a call.
    """

    def __init__(self, variant: Variant, only: Collection[Site] | None) -> None:
        super().__init__()
        self.sites: list[Site] = []
        self._variant, self._only = variant, only

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        site = _site() if name_of(func) in self._variant.names else None
        if site is None or not (self._only is None or site in self._only):
            return func(*args, **kwargs)
        found = self._variant.run(func, args, kwargs)
        if found is NotImplemented:
            return func(*args, **kwargs)
        if site not in self.sites:
            self.sites.append(site)
        return found


def _site() -> Site:
    """Returns the site of the call of a function in the code of a user: that of all calls in a loop is the same."""
    frame = user_frame()
    return frame.f_code.co_filename, frame.f_code.co_firstlineno, frame.f_lasti


def user_frame() -> FrameType:
    """Returns the frame of the user's code that called a function; to be called in `__torch_function__`."""
    frame = sys._getframe(2)
    while frame.f_back is not None and is_dispatch(frame.f_code):
        frame = frame.f_back
    return frame


def is_dispatch(code: CodeType) -> bool:
    """Returns whether code is of PyTorch, or of another mode in which a module runs."""
    return code.co_filename.startswith(_TORCH) or code.co_name == "__torch_function__"


def _plain(item: Any) -> Any:
    """Returns numbers, flags and texts; None for anything else."""
    return item if isinstance(item, (bool, int, float, str)) else None
