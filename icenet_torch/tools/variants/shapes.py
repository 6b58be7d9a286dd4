"""Operations that determine the shape of an output: rounding of a pooling, padding, resizing, and cut ends."""

from __future__ import annotations

from typing import Any

from icenet_torch.tools.variants import choices
from icenet_torch.tools.variants.variant import Variant, arguments, name_of

_POOLS = frozenset({f"{kind}_pool{axes}d" for kind in ("max", "avg") for axes in (1, 2, 3)})
_DISPATCH = frozenset({"boolean_dispatch", "fn"})
"""Names of the functions that PyTorch calls for maximum pooling."""


def _rounded_down(func: Any, args: Any, kwargs: Any) -> Any:
    names: tuple[str, ...] = ("input", "kernel_size", "stride", "padding")
    names += ("ceil_mode",) if name_of(func).startswith("avg") else ("dilation", "ceil_mode")
    given = arguments(names, args, kwargs)
    return func(**{**given, "ceil_mode": False}) if given.get("ceil_mode") else NotImplemented


def _unchanged(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs["input"]


def _whole(func: Any, args: Any, kwargs: Any) -> Any:
    """Leaves out a slice that cuts the end off."""
    x, index = args
    items = index if isinstance(index, tuple) else (index,)
    cuts = [isinstance(i, slice) and i.start in (None, 0) and isinstance(i.stop, int) and i.stop < 0 for i in items]
    if not any(cuts):
        return NotImplemented
    return func(x, tuple(slice(None) if cut else item for cut, item in zip(cuts, items, strict=True)))


VARIANTS: list[Variant] = [
    Variant(
        "ceil_mode is True in b, and MLX's pooling rounds down: pad the ends of the input in a",
        _POOLS | _DISPATCH,
        _rounded_down,
    ),
    Variant("padding is left out in a", frozenset({"pad"}), _unchanged),
    Variant("resizing (interpolate) is left out in a", frozenset({"interpolate"}), _unchanged),
    Variant("a slice that cuts the end off is left out in a", frozenset({"getitem"}), _whole),
    choices.SMALLEST,
    *choices.NUMBERS,
]
"""Tried if the shapes of both sides differ."""
