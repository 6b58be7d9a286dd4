"""Numbers in the calls of a module: eps, theta, scales and slopes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from icenet_torch.tools.variants.angles import THETA
from icenet_torch.tools.variants.variant import FunctionCall, Run, Variant, arguments

EPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12, 0.0)
BOUNDED = frozenset(
    {"clamp", "clip", "clamp_min", "clamp_max", "clamp_", "hardtanh", "minimum", "maximum", "threshold"}
)
"""Functions with bounds."""
_CLIPPED = frozenset({"softplus", "exp", "sigmoid", "tanh", "relu", "softmax", "square", "sqrt", "sum", "norm"})
"""Functions whose results may be clipped."""
_MOST_CLIPS = 6
"""Number of numbers at which results are clipped."""
_FACTORS = ("mul", "rmul", "div", "truediv")
"""Functions of which a number is a factor."""
_LARGEST_EPS = 1e-2
_LARGEST_LOG = 100
"""A theta below this number is a logarithm, as that of 10000 in exp(-log(10000) * i / n)."""
_LARGEST_COUNT = 4096
"""Largest number of values that a logarithm of theta is divided by."""
_MOST_FACTORS = 4
"""Number of factors of sums that are tried."""
_EQUAL = 1e-9
"""Relative difference up to which two numbers are the same one."""


def number_variants(
    calls: Sequence[FunctionCall], others: Sequence[float], bounds: Sequence[float] = ()
) -> list[Variant]:
    """Returns variants of the numbers in the calls of a module: eps, theta and scales.

    Args:
        calls: What `spying` found.
        others: Numbers that the module under test holds.
        bounds: Further numbers of it, that may be bounds.
    """
    found: dict[tuple[str, float, float], Variant] = {}
    for name, args, kwargs, _ in calls:
        numbers = [n for n in (*args, *kwargs.values()) if isinstance(n, (int, float)) and not isinstance(n, bool)]
        for old in map(float, numbers[:2] if name == "linspace" else numbers):
            what, candidates = _candidates(name, old, [*others, *bounds])
            texts: dict[float, str] = {}
            for new, text in _other_thetas(old, others) if what == "a scale" else ():
                texts.setdefault(new, text)
            for new in map(float, (*candidates, *others) if what else ()):
                if what == "eps" and not 0 <= new <= _LARGEST_EPS:
                    continue
                if text := _text(what, name, old, new):
                    texts.setdefault(new, text)
            for new, text in texts.items():
                found.setdefault((name, old, new), Variant(text, frozenset({name}), replacing(old, new)))
    return list(found.values())


def _candidates(name: str, old: float, bounds: Sequence[float]) -> tuple[str, tuple[float, ...]]:
    """Returns what a number in a call is, and the numbers that are tried in its place; an empty text for no such one.

    Args:
        name: The function.
        old: The number.
        bounds: Those that are tried in the place of a bound.
    """
    if name in ("layer_norm", "group_norm", "batch_norm", "rms_norm", "instance_norm", "normalize"):
        return "eps", EPS if 0 <= old <= _LARGEST_EPS else ()
    if name in ("add", "radd", "iadd", "sub", "clamp", "clamp_min", "maximum") and 0 <= old <= _LARGEST_EPS:
        return "eps", EPS
    if name in ("pow", "rpow") and old >= 100:
        return "theta", THETA
    if name == "rpow":
        return "the base of a power", (2 * old, old / 2)
    if name in ("pow", "float_power"):
        return "an exponent", (-old, 2 * old, old / 2, 1.0)
    if name in _FACTORS and abs(old) > 2 and _is_log(abs(old)):
        return "theta", tuple(math.copysign(math.log(theta), old) for theta in THETA)
    if name in _FACTORS and old:
        return "a scale", _scales(old)
    if name == "linspace":
        return "an end of linspace", (0.0, 1.0, -1.0, -old, 2 * old, old / 2)
    if name in ("leaky_relu", "elu", "celu", "softplus"):
        return "the slope or alpha", (0.01, 0.1, 0.2, 0.3, 0.5, 1.0)
    if name in BOUNDED:  # those of the same sign first, if several have the same effect
        return "a bound", tuple(sorted(bounds, key=lambda n: n * old < 0))
    if name in ("add", "sub", "rsub", "radd"):
        return "a number", (0.0, 1.0, 2.0)
    return ("a number", ()) if name == "mul" else ("", ())


def _scales(old: float) -> tuple[float, ...]:
    found: tuple[float, ...] = (old * old, math.sqrt(abs(old)), 1.0, -old, 1 / old, 2 * old, old / 2)
    if abs(old) < 1:  # the scale of an attention, of the width of all heads in place of that of one
        found += tuple(old / math.sqrt(heads) for heads in (2, 4, 8, 12, 16))
        return found + tuple(old * math.sqrt(heads) for heads in (2, 8, 12, 16))  # of a part of each head
    found += tuple(old * heads**power for heads in (2, 4, 8, 12, 16) for power in (-0.5, 0.5))
    return found + ((old - 1, old + 1) if old == round(old) > 2 else ())


def _text(what: str, name: str, old: float, new: float) -> str:
    """Returns the text of a number that is another one; empty for numbers that are not compared."""
    is_log = what == "theta" and abs(old) < _LARGEST_LOG
    if abs(old - new) <= _EQUAL * max(abs(old), 1e-12) or (is_log and abs(new) >= _LARGEST_LOG):
        return ""
    if what == "a number" and new == 0 and "sub" not in name:
        return f"{old:.6g} is not added in a"
    shown = (math.exp(abs(new)), math.exp(abs(old))) if is_log else (new, old)
    root = tuple(map(_root, shown)) if what == "a scale" else ("", "")
    return f"{what} is {shown[0]:.6g}{root[0]} in a, {shown[1]:.6g}{root[1]} in b"


def clip_variants(calls: Sequence[FunctionCall], others: Sequence[float]) -> list[Variant]:
    """Returns the variants of activations whose results are clipped at a number.

    Args:
        calls: What `spying` found.
        others: Numbers in the code of the module under test.
    """
    known = {
        abs(float(n)) for call in calls for n in (*call.args, *call.kwargs.values()) if isinstance(n, (int, float))
    }
    return [
        Variant(f"clipped at {number:g} from {side} in a", _CLIPPED, _clipped(**{limit: number}))
        for number in [n for n in others if abs(n) not in known][:_MOST_CLIPS]
        for limit, side in (("min", "below"), ("max", "above"))
    ]


def sum_variants(calls: Sequence[FunctionCall]) -> list[Variant]:
    """Returns the variants of a sum in which only one of the terms is multiplied by a number of the code."""
    names = {"add", "iadd"}
    if names.isdisjoint(call.name for call in calls):
        return []
    factors = {}
    for name, args, kwargs, _ in calls:
        is_product = name in _FACTORS
        for n in (*args, *kwargs.values()) if is_product else ():
            if isinstance(n, (int, float)) and not isinstance(n, bool) and n not in (0, 1):
                factors[n if "div" in name else 1 / n] = f"{'divided' if 'div' in name else 'multiplied'} by {n:.6g}"
    return [
        Variant(f"the {text} term of a sum is not {what} in a", frozenset(names), _times(factor, place))
        for factor, what in list(factors.items())[:_MOST_FACTORS]
        for place, text in enumerate(("first", "second"))
    ]


def _times(factor: float, place: int) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        both = len(args) == 2 and all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in args)
        if not both:
            return NotImplemented
        return func(*(factor * x if i == place else x for i, x in enumerate(args)), **kwargs)

    return run


def _without_end(func: Any, args: Any, kwargs: Any) -> Any:
    given = arguments(("start", "end", "steps"), args, kwargs)
    steps = given["steps"]
    if not isinstance(steps, int) or steps < 2:
        return NotImplemented
    given["end"] = given["end"] - (given["end"] - given["start"]) / steps
    return func(**given)


VARIANTS = [Variant("linspace leaves out its end in a, as arange does", frozenset({"linspace"}), _without_end)]


def _other_thetas(old: float, others: Sequence[float]) -> Iterator[tuple[float, str]]:
    """Yields log(theta) / n with another theta, if a number is that of a known one, as in exp(-log(1e4) / n * i)."""
    for theta in THETA:
        count = math.log(theta) / abs(old)
        if 2 <= count <= _LARGEST_COUNT and abs(count - round(count)) < 1e-9 * count:
            for new in dict.fromkeys((*(n for n in others if n >= 10), *THETA)):
                if new != theta:
                    text = f"theta is {new:.6g} in a, {theta:.6g} in b"
                    yield math.copysign(math.log(new) / round(count), old), text


def _clipped(**limits: float) -> Run:
    return lambda func, args, kwargs: func(*args, **kwargs).clamp(**limits)


def _root(value: float) -> str:
    """Returns of which number a scale is the square root, if that is a whole one."""
    square = value * value
    is_root = square > 1.5 and abs(square - round(square)) < 1e-6 and abs(value - round(value)) > 1e-6
    return f" (the square root of {round(square)})" if is_root else ""


def _is_log(value: float) -> bool:
    return any(abs(value - math.log(theta)) < 1e-6 * value for theta in THETA)


def replacing(old: float, new: float) -> Run:
    """Returns the variant of a call with another number."""

    def change(item: Any) -> Any:
        is_number = isinstance(item, (int, float)) and not isinstance(item, bool)
        if not (is_number and abs(item - old) <= _EQUAL * max(abs(old), 1e-12)):
            return item
        return int(new) if isinstance(item, int) and float(new).is_integer() else new  # a sum of ids stays one

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        changed = tuple(map(change, args)), {name: change(item) for name, item in kwargs.items()}
        same = all(x is y for x, y in zip(changed[0], args, strict=True))
        if same and all(changed[1][name] is item for name, item in kwargs.items()):
            return NotImplemented
        return func(*changed[0], **changed[1])

    return run
