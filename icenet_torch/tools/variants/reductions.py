"""Reductions, such as means and maxima, over other axes."""

from __future__ import annotations

from typing import Any

from icenet_torch.tools.variants.variant import Run, Variant

_NAMES = {
    "mean": "mean",
    "sum": "sum",
    "var": "variance",
    "std": "standard deviation",
    "amax": "maximum",
    "amin": "minimum",
    "max": "maximum",
    "min": "minimum",
    "logsumexp": "logsumexp",
    "norm": "norm",
    "normalize": "normalization to unit length",
    "argmax": "argmax",
    "argmin": "argmin",
    "cumsum": "cumulative sum",
    "cumprod": "cumulative product",
    "logcumsumexp": "cumulative logsumexp",
}
"""Functions of PyTorch, and what they are called."""
_AXES: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3))


def _over(axes: tuple[int, ...]) -> Run:
    """Returns the variant of a reduction over other axes."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        place = 2 if getattr(func, "__name__", "") in ("norm", "normalize") else 1
        before = kwargs["dim"] if "dim" in kwargs else args[place] if len(args) > place else None
        old = before if isinstance(before, (tuple, list)) else (before,)
        x = args[0] if args else kwargs["input"]
        if any(not isinstance(axis, int) or isinstance(axis, bool) for axis in old) or max(axes) >= x.ndim:
            return NotImplemented
        if sorted(axis % x.ndim for axis in old) == list(axes):
            return NotImplemented
        new = axes if len(axes) > 1 else axes[0]
        if "dim" in kwargs:
            return func(*args, **{**kwargs, "dim": new})
        return func(*args[:place], new, *args[place + 1 :], **kwargs)

    return run


def _root(func: Any, args: Any, kwargs: Any) -> Any:
    y = func(*args, **kwargs)
    return (y + _EPS).sqrt() if y.is_floating_point() and bool((y >= 0).all()) else NotImplemented


def _square(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs).square()


def _of_absolutes(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0] if args else kwargs["input"]
    is_signed = x.is_floating_point() and bool((x < 0).any())
    rest = {name: item for name, item in kwargs.items() if name != "input"}
    return func(x.abs(), *args[1:], **rest) if is_signed else NotImplemented


_EPS = 1e-8
"""Added to what a root is taken of."""

VARIANTS: list[Variant] = [
    Variant(
        "the root of a sum, as of a distance, in a; the sum, as of a squared distance, in b",
        frozenset({"sum"}),
        _root,
    ),
    Variant(
        "a squared norm or distance in a, the norm or distance in b",
        frozenset({"norm", "linalg_vector_norm", "cdist"}),
        _square,
    ),
    *(
        Variant(
            f"the {what} over the {'axes' if len(axes) > 1 else 'axis'} {' and '.join(map(str, axes))} in a, over "
            "another one in b",
            frozenset({name}),
            _over(axes),
        )
        for name, what in _NAMES.items()
        for axes in _AXES
    ),
]
ABSOLUTE = Variant("the absolute values are summed in a, the values in b", frozenset({"sum"}), _of_absolutes)
