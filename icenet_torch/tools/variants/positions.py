"""Rows of a table, ids and slices that begin at another number, as positions do; another position that is taken."""

from __future__ import annotations

from typing import Any

import torch

from icenet_torch.tools.variants.variant import Run, Variant, arguments, name_of

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
        cut = [i for i, item in enumerate(items) if isinstance(item, slice) and item != slice(None)]
        if len(cut) != 1 or any(not isinstance(item, (slice, type(Ellipsis))) for item in items):
            return NotImplemented
        is_last = any(item is Ellipsis for item in items[: cut[0]])
        item = moved(items[cut[0]], x.shape[cut[0] - len(items) if is_last else cut[0]])
        new = (*items[: cut[0]], item, *items[cut[0] + 1 :])
        return NotImplemented if item is items[cut[0]] else func(x, new)

    return run


def _cut_moved(by: int | None) -> Run:
    """Returns the variant of slices that cut elements off, as x[1:-1]: moved by a number; None: to the other end."""

    def moved(item: Any) -> Any:
        if not isinstance(item, slice) or item.step not in (None, 1) or (item.stop is not None and item.stop >= 0):
            return item
        first, last = item.start or 0, -(item.stop or 0)
        if first < 0 or (first == last and (by is None or not first)):
            return item
        first, last = (last, first) if by is None else (first + by, last - by)
        return slice(first, -last if last else None) if first >= 0 and last >= 0 else item

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        x, index = args
        items = index if isinstance(index, tuple) else (index,)
        new = tuple(map(moved, items))
        is_same = all(one is other for one, other in zip(new, items, strict=True))
        return NotImplemented if is_same else func(x, new)

    return run


def _other_places(func: Any, args: Any, kwargs: Any) -> Any:
    """Takes the elements of odd places where those of even ones are taken, and the reverse."""
    x, index = args
    items = index if isinstance(index, tuple) else (index,)

    def moved(item: Any) -> Any:
        is_second = isinstance(item, slice) and item.step == 2 and item.stop is None and item.start in (None, 0, 1)
        return slice(0 if item.start == 1 else 1, None, 2) if is_second else item

    new = tuple(map(moved, items))
    is_same = all(one is other for one, other in zip(new, items, strict=True))
    return NotImplemented if is_same else func(x, new)


def _ids_moved(by: int) -> Run:
    """Returns the variant of an embedding whose ids are other by a number."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(("input", "weight"), args[:2], kwargs)
        ids = given["input"]
        if not ids.numel() or int(ids.min()) + by < 0 or int(ids.max()) + by >= len(given["weight"]):
            return NotImplemented
        rest = {name: item for name, item in kwargs.items() if name not in given}
        return func(ids + by, given["weight"], *args[2:], **rest)

    return run


def _row_moved(by: int) -> Run:
    """Returns the variant of `table[ids]` and `gather` with other ids."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        place = 1 if name_of(func) == "getitem" else 2
        ids = args[place] if len(args) > place else None
        if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int32, torch.int64) or not ids.numel():
            return NotImplemented
        size = args[0].shape[0 if place == 1 else args[1]]
        if int(ids.min()) + by < 0 or int(ids.max()) + by >= size:
            return NotImplemented
        return func(*args[:place], ids + by, *args[place + 1 :], **kwargs)

    return run


def _text(by: int) -> str:
    return f"{abs(by)} {'later' if by > 0 else 'earlier'}"


def _pooled(kind: str) -> Run:
    """Returns the variant of a single position that is taken: another one, or what all of them give."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        x, index = args
        items = index if isinstance(index, tuple) else (index,)
        axes = [i for i, item in enumerate(items) if isinstance(item, int) and not isinstance(item, bool)]
        if len(axes) != 1 or axes[0] == 0 or any(not isinstance(item, (int, slice)) for item in items):
            return NotImplemented
        if kind in ("first", "last"):
            return func(x, (*items[: axes[0]], 0 if kind == "first" else -1, *items[axes[0] + 1 :]))
        whole = func(x, tuple(slice(None) if isinstance(item, int) else item for item in items))
        return whole.mean(axes[0]) if kind == "mean" else whole.amax(axes[0])

    return run


def _taken(position: int) -> Run:
    """Returns the variant of a mean over an axis that takes one position."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(("input", "dim", "keepdim"), args, kwargs)
        if not isinstance(given.get("dim"), int) or given.get("keepdim"):
            return NotImplemented
        return given["input"].select(given["dim"], position)

    return run


def _counted(by: int | None) -> Run:
    """Returns the variant of positions that count from another number on; None: from 0 on."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        y = func(*args, **kwargs)
        begins_at_zero = not len(y) or (by is None and not y[0])
        return NotImplemented if begins_at_zero else y - y[0] if by is None else y + by

    return run


_STEPS = [number * sign for number in range(1, _MOST + 1) for sign in (-1, 1)]

VARIANTS: list[Variant] = [
    *(
        Variant(f"{text} in a, one position in b", frozenset({"getitem"}), _pooled(kind))
        for kind, text in (("mean", "the mean"), ("max", "the maximum"))
    ),
    *(
        Variant(f"the {kind} position in a, another one in b", frozenset({"getitem"}), _pooled(kind))
        for kind in ("first", "last")
    ),
    *(
        Variant(f"the {text} position in a, the mean in b", frozenset({"mean"}), _taken(position))
        for text, position in (("first", 0), ("last", -1))
    ),
    *(
        Variant(
            f"a slice, as of a table of positions, begins {_text(by)} in a",
            frozenset({"getitem"}),
            _rows_moved(by),
        )
        for by in _STEPS
    ),
    Variant("the elements of even and odd places are exchanged in a", frozenset({"getitem"}), _other_places),
    *(
        Variant(f"a slice that cuts elements off, as x[1:], {text} in a", frozenset({"getitem"}), _cut_moved(by))
        for by, text in (
            (None, "cuts them off at the other end"),
            (1, "begins and ends 1 later"),
            (-1, "begins and ends 1 earlier"),
        )
    ),
    *(
        Variant(
            f"the rows of the embedding are {_text(by)} in a: an offset of the ids, as of positions",
            frozenset({"embedding"}),
            _ids_moved(by),
        )
        for by in _STEPS
    ),
    *(
        Variant(
            f"the ids of rows of a table are {abs(by)} {'larger' if by > 0 else 'smaller'} in a",
            frozenset({"getitem", "gather", "index_select"}),
            _row_moved(by),
        )
        for by in (-1, 1)
    ),
    Variant("positions (arange) begin at 0 in a, at another number in b", frozenset({"arange"}), _counted(None)),
    *(Variant(f"positions (arange) begin {_text(by)} in a", frozenset({"arange"}), _counted(by)) for by in _STEPS),
]
