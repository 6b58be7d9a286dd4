"""Maxima of PyTorch without a gradient.

A softmax subtracts a maximum before the exponential, which does not change the result: any other number would do. The
gradient by the scores is then passed on to the maximum, too, with the opposite sign, so that its rounding error
cancels in all that the scores of a row have in common. Code that subtracts another number, or a constant, has the
error of the terms there. `constant_maxima` shows how large it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_MAXIMA = {"max", "amax"}
_REDUCTIONS = {"scatter_reduce", "scatter_reduce_", "index_reduce", "index_reduce_", "segment_reduce"}


@contextlib.contextmanager
def constant_maxima() -> Iterator[list[str]]:
    """Passes no gradient on to what a maximum is taken of, while the context is open.

    Yields:
        A list to which the name of each such function is added.
    """
    names: list[str] = []
    with _Constant(names):
        yield names


class _Constant(TorchFunctionMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        is_reduction = name in _REDUCTIONS and {"amax", "max"} & {
            x for x in (*args, *kwargs.values()) if type(x) is str
        }
        if name not in _MAXIMA and not is_reduction:
            return func(*args, **kwargs)
        self._names.append(name)
        return func(*map(_constant, args), **{key: _constant(item) for key, item in kwargs.items()})


def _constant(item: Any) -> Any:
    return item.detach() if isinstance(item, Tensor) else item
