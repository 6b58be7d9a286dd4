"""Functions of a user that a module calls, such as `rotate_half`: left out, or with exchanged arguments."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch

EXCHANGED = -1
"""The change of a call whose first two arrays are exchanged."""
_NOT_CALLED = ("forward", "extra_repr")


class HelperCall(NamedTuple):
    """A call of a function of a user: its name, its number among the calls of it, and what can be changed.

    Attributes:
        changes: Numbers of the results that an argument can replace, or EXCHANGED.
    """

    name: str
    number: int
    changes: tuple[int, ...]


@contextlib.contextmanager
def helpers(
    module: torch.nn.Module, names: Mapping[int, dict[str, Any]], only: tuple[str, int | None, int] | None = None
) -> Iterator[list[HelperCall]]:
    """Yields a list to which the calls of a user's functions are added while the context is open.

    Args:
        module: Its methods are observed.
        names: What `globals_used` found: the functions among them are observed.
        only: Name, number (None: each call) and change of the call that is changed; None to change none.
    """
    found: list[HelperCall] = []
    counts: Counter[str] = Counter()
    changed_name, changed_number, change = only or ("", None, 0)

    def observed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            number = counts[name]
            counts[name] += 1
            is_changed = name == changed_name and changed_number in (None, number)
            if is_changed and change == EXCHANGED:
                return function(args[1], args[0], *args[2:], **kwargs)
            y = function(*args, **kwargs)
            results = y if isinstance(y, tuple) else (y,)
            given = [item for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor)]
            found.append(HelperCall(name, number, tuple(_changes(given, results, args))))
            if not is_changed or change >= len(results):
                return y
            new = (*results[:change], given[min(change, len(given) - 1)], *results[change + 1 :])
            return new if isinstance(y, tuple) else new[0]

        return call

    cls = type(module)
    methods = {
        name: getattr(module, name)
        for name, item in vars(cls).items()
        if isinstance(item, FunctionType) and not name.startswith("__") and name not in (*_NOT_CALLED, *vars(module))
    }
    before = [(own, name, item) for own in names.values() for name, item in own.items() if _is_helper(own, item)]
    held = vars(module)
    try:
        held.update({name: observed(name, item) for name, item in methods.items()})
        for own, name, item in before:
            own[name] = observed(name, item)
        yield found
    finally:
        for name in methods:
            del held[name]
        for own, name, item in before:
            own[name] = item


def _is_helper(own: Mapping[str, Any], item: Any) -> bool:
    """Returns whether a global name of a user's code is a function of that file."""
    return isinstance(item, FunctionType) and item.__module__ == own.get("__name__")


def _changes(given: list[torch.Tensor], results: tuple[Any, ...], args: tuple[Any, ...]) -> Iterator[int]:
    for index, result in enumerate(results):
        x = given[min(index, len(given) - 1)] if given else None
        if isinstance(result, torch.Tensor) and x is not None and x.shape == result.shape and x.dtype == result.dtype:
            yield index
    both = args[:2]
    if len(both) == 2 and all(isinstance(x, torch.Tensor) for x in both) and both[0].shape == both[1].shape:
        yield EXCHANGED
