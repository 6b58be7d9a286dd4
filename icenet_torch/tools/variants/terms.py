"""Sums and products: a factor of one term in place of the whole sum, and a number before a function or within it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from icenet_torch.tools.variants.variant import Run, Variant, name_of


def _regrouped(inner: str, change: Callable[[Any, Any, Any], Any]) -> Run:
    """Returns the variant of an operation on the result of another one.

    Args:
        inner: The function of the other operation, of x and y.
        change: Computes the result from x, y, and the other argument of the operation.
    """
    known: list[tuple[torch.Tensor, Any, Any]] = []

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        if len(args) != 2 or not any(isinstance(item, torch.Tensor) for item in args):
            return NotImplemented
        if name_of(func) == inner:
            result = func(*args, **kwargs)
            known[:] = [(result, args[0], args[1])]
            return result
        for one, other in (args, args[::-1]):
            if known and one is known[0][0]:
                return change(known[0][1], known[0][2], other)
        return NotImplemented

    return run


def _factor_outside() -> Run:
    """Returns the variant of `f(n * x)` that is `n * f(x)`, given a number n."""
    known: list[tuple[torch.Tensor, Any, Any]] = []

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        if name_of(func) in ("mul", "rmul"):
            y = func(*args, **kwargs)
            numbers = [item for item in args if isinstance(item, (int, float))]
            tensors = [item for item in args if isinstance(item, torch.Tensor)]
            known[:] = [(y, numbers[0], tensors[0])] if numbers and tensors else []
            return y
        if known and args and args[0] is known[0][0]:
            return known[0][1] * func(known[0][2], *args[1:], **kwargs)
        return NotImplemented

    return run


def _added(func: Any, args: Any, kwargs: Any) -> Any:
    both = len(args) == 2 and all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in args)
    return args[0] + args[1] if both else NotImplemented


_OF_A_TERM, _OF_A_SUM = frozenset({"mul", "add", "radd"}), frozenset({"mul", "rmul", "add"})

VARIANTS: list[Variant] = [
    *(
        Variant("a whole sum is multiplied in a, one of its terms in b", _OF_A_TERM, _regrouped("mul", change))
        for change in (lambda x, y, z: (x + z) * y, lambda x, y, z: x * (y + z))
    ),
    *(
        Variant("one term of a sum is multiplied in a, the whole sum in b", _OF_A_SUM, _regrouped("add", change))
        for change in (lambda x, y, z: x * z + y, lambda x, y, z: x + y * z)
    ),
    Variant(
        "a number multiplies the result of a function in a, its argument in b",
        frozenset({"mul", "rmul", "sin", "cos", "tanh", "exp", "sigmoid", "softmax", "softplus"}),
        _factor_outside(),
    ),
    Variant("a sum in a, a product in b", frozenset({"mul"}), _added),
]
