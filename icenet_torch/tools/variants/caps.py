"""Soft caps, c * tanh(x / c): of logits, and of the scores of an attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from icenet_torch.tools.variants.numbers import replacing
from icenet_torch.tools.variants.variant import FunctionCall, Run, Variant, arguments, name_of

CAPS = (30.0, 50.0, 20.0, 15.0, 10.0, 5.0, 100.0)
"""Caps of published models, the more frequent ones first."""
_PRODUCTS = ("mul", "rmul", "imul")
_QUOTIENTS = ("div", "truediv", "itruediv")


def _cap_of(calls: Sequence[FunctionCall]) -> float | None:
    """Returns the number by which a tanh is multiplied and its input is divided; None without one."""
    if all(call.name != "tanh" for call in calls):
        return None

    def numbers(names: Sequence[str]) -> list[float]:
        found = (item for call in calls if call.name in names for item in (*call.args, *call.kwargs.values()))
        return [float(n) for n in found if isinstance(n, (int, float)) and not isinstance(n, bool)]

    products, quotients = numbers(_PRODUCTS), numbers(_QUOTIENTS)
    inverse = [n for n in products if n and any(abs(m * n - 1) < 1e-9 for m in products)]
    return next((n for n in (*products, *inverse) if n > 1 and (n in quotients or 1 / n in products)), None)


def cap_variants(calls: Sequence[FunctionCall], others: Sequence[float]) -> list[Variant]:
    """Returns the variants of a module that has a soft cap, or that has none.

    Args:
        calls: What `spying` found.
        others: Numbers that the module under test holds.
    """
    cap = _cap_of(calls)
    caps = dict.fromkeys((*(n for n in others if n > 1), *CAPS))
    if cap is None:
        return [
            Variant(
                f"a soft cap, {new:g} * tanh(x / {new:g}), of the scores in a",
                frozenset({"softmax"}),
                _capped_softmax(new),
            )
            for new in caps
        ]

    def without(func: Any, args: Any, kwargs: Any) -> Any:
        return args[0] if args else kwargs["input"]

    return [
        Variant(f"the soft cap of b, {cap:g} * tanh(x / {cap:g}), is left out in a", frozenset({"tanh"}), without),
        *(
            Variant(
                f"the soft cap is {new:g} in a, {cap:g} in b",
                frozenset({*_PRODUCTS, *_QUOTIENTS}),
                _with_cap(cap, new),
            )
            for new in caps
            if new != cap
        ),
    ]


def capped(array: np.ndarray, cap: float) -> np.ndarray:
    """Returns an array with a soft cap."""
    found: np.ndarray = cap * np.tanh(np.asarray(array, np.float64) / cap)
    return found


def _with_cap(old: float, new: float) -> Run:
    runs = replacing(old, new), replacing(1 / old, 1 / new)

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        for one in runs if name_of(func) in _PRODUCTS else runs[:1]:
            if (found := one(func, args, kwargs)) is not NotImplemented:
                return found
        return NotImplemented

    return run


def _capped_softmax(cap: float) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(("input", "dim"), args, kwargs)
        x = given.pop("input")
        seen = torch.isfinite(x) & (x > -1e4)
        return func(torch.where(seen, cap * torch.tanh(x / cap), x), **given)

    return run
