"""Rows of a table of positions that begin at another number."""

from __future__ import annotations

from typing import Any

import torch

from icenet_torch.tools.variants.variant import Run, Variant, arguments

_MOST = 4
"""Largest offset that is tried."""


def _rows_moved(by: int) -> Run:
    """Returns the variant of `table[start:stop]` that takes rows from another number on."""

    def moved(item: Any, size: int) -> Any:
        if not isinstance(item, slice) or item.step not in (None, 1) or item.stop is None:
            return item
        start, stop = item.start or 0, item.stop
        fits = start >= 0 and stop > 0 and start + by >= 0 and stop + by <= size
        return slice(start + by, stop + by) if fits and (start, stop) != (0, size) else item

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        x, index = args
        items = index if isinstance(index, tuple) else (index,)
        axes = [i for i, item in enumerate(items) if isinstance(item, slice) and item != slice(None)]
        if len(axes) != 1 or any(item is Ellipsis or item is None for item in items) or not _is_table(x):
            return NotImplemented
        new = tuple(moved(item, x.shape[i]) if i in axes else item for i, item in enumerate(items))
        return NotImplemented if new[axes[0]] is items[axes[0]] else func(x, new)

    return run


def _is_table(x: torch.Tensor) -> bool:
    """Returns whether a tensor is that of a module: a parameter or a buffer, of two axes or with a first one of 1."""
    rows = x[0] if x.ndim == 3 and x.shape[0] == 1 else x
    return x.is_leaf and rows.ndim == 2 and x.is_floating_point()


def _ids_moved(by: int) -> Run:
    """Returns the variant of an embedding whose ids are other by a number."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(("input", "weight"), args[:2], kwargs)
        ids = given["input"]
        if not ids.numel() or int(ids.min()) + by < 0 or int(ids.max()) + by >= len(given["weight"]):
            return NotImplemented
        return func(ids + by, given.pop("weight"), *args[2:], **{k: v for k, v in kwargs.items() if k not in given})

    return run


def _text(by: int) -> str:
    return f"{abs(by)} {'later' if by > 0 else 'earlier'}"


_STEPS = [number * sign for number in range(1, _MOST + 1) for sign in (-1, 1)]

VARIANTS: list[Variant] = [
    *(
        Variant(
            f"the rows of the table begin {_text(by)} in a: an offset, as of positions",
            frozenset({"getitem"}),
            _rows_moved(by),
        )
        for by in _STEPS
    ),
    *(
        Variant(
            f"the rows of the embedding are {_text(by)} in a: an offset of the ids, as of positions",
            frozenset({"embedding"}),
            _ids_moved(by),
        )
        for by in _STEPS
    ),
]
