"""Variants of functions, and the context that applies one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.overrides import TorchFunctionMode

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


@contextlib.contextmanager
def applied(variant: Variant, only: int | None = None) -> Iterator[None]:
    """Applies a variant to all calls of its functions, or to that with a number, while the context is open."""
    with _Applied(variant, only):
        yield


@contextlib.contextmanager
def spying() -> Iterator[list[tuple[str, tuple[Any, ...], dict[str, Any]]]]:
    """Yields a list to which each call of a function is added: its name and its arguments, numbers and flags only."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    with _Spy(calls):
        yield calls


class _Spy(TorchFunctionMode):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._calls.append((name_of(func), tuple(map(_plain, args)), {k: _plain(v) for k, v in kwargs.items()}))
        return func(*args, **kwargs)


class _Applied(TorchFunctionMode):
    def __init__(self, variant: Variant, only: int | None) -> None:
        super().__init__()
        self._variant, self._only, self._count = variant, only, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if name_of(func) in self._variant.names:
            number = self._count
            self._count += 1
            if self._only is None or self._only == number:
                found = self._variant.run(func, args, kwargs)
                if found is not NotImplemented:
                    return found
        return func(*args, **kwargs)


def _plain(item: Any) -> Any:
    """Returns numbers, flags and texts; None for anything else."""
    return item if isinstance(item, (bool, int, float, str)) else None
