"""Windows of attention: masks that show a band of keys around each position, of another width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from icenet_torch.tools.variants.masks import HIDES, LOW, SUMS, masking
from icenet_torch.tools.variants.variant import Run, Variant, arguments

_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_ANY = 10**6
"""A distance that is larger than those of all keys."""
Change = Callable[[int, int], tuple[int, int]]
"""Returns another first and last key that a position sees, relative to it. An edge that hides no key is not moved."""


def band(seen: torch.Tensor) -> tuple[int, int] | None:
    """Returns the first and the last key that a mask [..., T, S] shows, relative to each position; None for others.

    An edge that cuts nothing off is -S or S.
    """
    if seen.ndim < 2 or min(seen.shape[-2:]) < 3:
        return None
    rows = seen.reshape(-1, *seen.shape[-2:])
    first, count = rows[0], seen.shape[-1]
    if not bool((rows == first).all()) or not bool(first.any(-1).all()):
        return None
    distance = _distances(first)
    low, high = int(distance[first].min()), int(distance[first].max())
    if not torch.equal(first, (distance >= low) & (distance <= high)):
        return None
    low = -count if low == int(distance.min()) else low
    high = count if high == int(distance.max()) else high
    return None if (low, high) == (-count, count) else (low, high)


def shown_keys(mask: np.ndarray) -> str:
    """Returns which keys a mask of booleans shows, relative to each position; empty if it shows no band."""
    edges = band(torch.from_numpy(np.array(mask, bool)))
    if edges is None:
        return ""
    low, high = edges
    count = mask.shape[-1]
    first = "the first one" if low <= -count else f"{low:+d}" if low else "itself"
    last = "the last one" if high >= count else f"{high:+d}" if high else "itself"
    return f"the keys from {first} to {last}"


def _distances(mask: torch.Tensor) -> torch.Tensor:
    """Returns the distance of each key from the position of each row; the last rows are those of the last keys."""
    rows, count = mask.shape[-2:]
    return torch.arange(count)[None] - torch.arange(count - rows, count)[:, None]


def _moved(change: Change, adds: bool = False) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """Returns the function of a mask, True for what is seen, that returns one of another window; None for others.

    Args:
        change: Moves the edges.
        adds: Whether an edge that hides no key is moved, too: then a causal mask gets a window.
    """

    def move(seen: torch.Tensor) -> torch.Tensor | None:
        edges = band(seen)
        if edges is None:
            return None
        count = seen.shape[-1]
        low, high = change(*edges)
        if not adds:
            low, high = (low if edges[0] > -count else edges[0]), (high if edges[1] < count else edges[1])
        if (max(low, -count), min(high, count)) == edges or low > high:
            return None
        distance = _distances(seen)
        return ((distance >= low) & (distance <= high)).expand(seen.shape)

    return move


def _of_attention(change: Change, adds: bool = False) -> Run:
    """Returns the variant of scaled_dot_product_attention with another window."""
    move = _moved(change, adds)

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(_ATTENTION, args, kwargs)
        mask = given.get("attn_mask")
        if mask is None and given.get("is_causal") and adds:
            mask = torch.ones(given["query"].shape[-2], given["key"].shape[-2], dtype=torch.bool).tril()
        if mask is None:
            return NotImplemented
        new = move(mask if mask.dtype == torch.bool else mask > LOW)
        return NotImplemented if new is None else func(**{**given, "attn_mask": new, "is_causal": False})

    return run


def _hiding(change: Change, adds: bool = False) -> Run:
    """Returns the variant of masked_fill, where and sums with another window."""
    move = _moved(change, adds)

    def hide(hidden: torch.Tensor) -> torch.Tensor:
        new = move(~hidden)
        return hidden if new is None else ~new

    return masking(hide)


def _longer(by: int) -> Change:
    """Returns the change of the edges that are not at the position itself, outwards."""
    return lambda low, high: (low - by if low else low, high + by if high else high)


def _farther(by: int) -> Change:
    return lambda low, high: (low - by, high)


_CHANGES: list[tuple[str, Change]] = [
    ("the window of the attention mask is left out in a", lambda low, high: (-_ANY, high)),
    ("the attention mask is left out in a: each query attends to all keys", lambda low, high: (-_ANY, _ANY)),
    *(
        (f"the window of the attention mask is {abs(by)} key{'s' * (abs(by) > 1)} {what} in a{where}", change(by))
        for size in (1, 2, 3, 4, 8)
        for by, what in ((size, "longer"), (-size, "shorter"))
        for where, change in (("", _farther), (" on both sides", _longer))
    ),
    ("the window of the attention mask is twice as long in a", lambda low, high: (2 * low - 1, high)),
    ("the window of the attention mask is half as long in a", lambda low, high: ((low - 1) // 2 + 1, high)),
]


def _variants(text: str, change: Change, adds: bool = False) -> list[Variant]:
    return [
        Variant(text, frozenset({"scaled_dot_product_attention"}), _of_attention(change, adds)),
        Variant(text, HIDES - SUMS, _hiding(change, adds)),  # a mask that one of them makes may be added by the other
        Variant(text, SUMS, _hiding(change, adds)),
    ]


def _of_size(size: int) -> Change:
    return lambda low, high: (max(low, 1 - size), high)


VARIANTS: list[Variant] = [variant for text, change in _CHANGES for variant in _variants(text, change)]
ADDED: list[Variant] = [
    variant
    for size in (*range(1, 9), 12, *(2**power for power in range(4, 13)))
    for variant in _variants(f"a window of {size} keys in the attention mask of a, none in b", _of_size(size), True)
]
"""Tried after all others, as each causal mask may get them."""
