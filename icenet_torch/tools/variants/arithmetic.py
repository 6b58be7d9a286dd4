"""Arithmetic of single values: squares, roots, signs, differences, maxima, and the choices of `where`."""

from __future__ import annotations

from typing import Any

import torch

from icenet_torch.tools.variants.variant import Run, Variant, arguments, left_out


def _unsquared(func: Any, args: Any, kwargs: Any) -> Any:
    is_square = len(args) < 2 or args[1] == 2
    return args[0] if args and is_square else NotImplemented


def _root_left_out(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0] if args else kwargs["input"]
    return x.reciprocal() if func in (torch.rsqrt, torch.Tensor.rsqrt) else x


def _negated(func: Any, args: Any, kwargs: Any) -> Any:
    return func(-args[0], *args[1:], **kwargs) if args and args[0].is_floating_point() else NotImplemented


def _other_sign(func: Any, args: Any, kwargs: Any) -> Any:
    """Takes the difference in place of a sum of two tensors, or the reverse."""
    if len(args) != 2 or not all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in args):
        return NotImplemented
    return func(args[0], -args[1], **kwargs)


def _other_extreme(kind: str) -> Run:
    """Returns the variant of a maximum over an axis that takes something else of it."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(("input", "dim", "keepdim"), args, kwargs)
        x, dim, keepdim = given["input"], given.get("dim"), bool(given.get("keepdim"))
        if isinstance(dim, torch.Tensor) or not x.is_floating_point() or "other" in given:
            return NotImplemented
        found = getattr(torch, kind)(x, **({} if dim is None else {"dim": dim, "keepdim": keepdim}))
        y = func(*args, **kwargs)
        return found if isinstance(y, torch.Tensor) else type(y)((found, y[1]))

    return run


def _choice(inverted: bool, first: bool = False) -> Run:
    """Returns the variant of `where` that chooses the other one, or always the first or the second."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        if len(args) != 3 or not isinstance(args[0], torch.Tensor):
            return NotImplemented
        # of a method, the condition is the second argument
        method = func is torch.Tensor.where
        x, condition, y = args if method else (args[1], args[0], args[2])
        every = torch.ones_like(condition)
        new = condition.logical_not() if inverted else every if first else every.logical_not()
        return func(x, new, y, **kwargs) if method else func(new, x, y, **kwargs)

    return run


def _compared(name: str) -> Run:
    """Returns the variant of a comparison that is another one."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        return getattr(torch, name)(*args) if isinstance(args[0], torch.Tensor) and len(args) == 2 else NotImplemented

    return run


_COMPARISONS = {"ge": ("gt", ">", ">="), "gt": ("ge", ">=", ">"), "le": ("lt", "<", "<="), "lt": ("le", "<=", "<")}
"""Functions that compare, those that differ from them in equal values, and what they are called in `a` and `b`."""
_MAXIMA = frozenset({"max", "amax"})
_UNEVEN = {"sigmoid": ", such as 1 - sigmoid(x)", "softplus": "", "logsigmoid": "", "relu": ""}
"""Functions of x that are another one of -x, and what to say of them."""

VARIANTS: list[Variant] = [
    Variant("a square is left out in a", frozenset({"square", "pow"}), _unsquared),
    Variant("a square root is left out in a", frozenset({"sqrt", "rsqrt"}), _root_left_out),
    Variant("the exponent of exp has the other sign in a", frozenset({"exp"}), _negated),
    Variant("a sign, -x, is left out in a", frozenset({"neg", "negative"}), left_out),
    *(
        Variant(f"the input of {name} has the other sign in a{text}", frozenset({name}), _negated)
        for name, text in _UNEVEN.items()
    ),
    Variant("a difference in a, a sum in b", frozenset({"add", "iadd"}), _other_sign),
    Variant("a sum in a, a difference in b", frozenset({"sub", "isub"}), _other_sign),
    Variant("mean in a, maximum in b", _MAXIMA, _other_extreme("mean")),
    Variant("sum in a, maximum in b", _MAXIMA, _other_extreme("sum")),
    Variant("maximum in a, logsumexp in b", frozenset({"logsumexp"}), _other_extreme("amax")),
    *(
        Variant(f"{ours} in a, {theirs} in b: equal values", frozenset({name}), _compared(other))
        for name, (other, ours, theirs) in _COMPARISONS.items()
    ),
    Variant("the condition of where is inverted in a", frozenset({"where"}), _choice(True)),
    *(
        Variant(f"where chooses always the {text} in a: its condition is left out", frozenset({"where"}), run)
        for text, run in (("first", _choice(False, True)), ("second", _choice(False)))
    ),
]
