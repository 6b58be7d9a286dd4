"""Masks that a module applies by itself, with masked_fill, where or a sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from icenet_torch.tools.variants.variant import Run, Variant, arguments, equal_axes, left_out, name_of

LOW = -1e3
"""Scores are hidden by a number at most as large as this."""
SUMS = frozenset({"add", "iadd", "radd"})
HIDES = frozenset({"masked_fill", "where"}) | SUMS
"""Functions with which scores are hidden."""


def masking(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Run:
    """Returns the variant of masked_fill, where and sums that hide other scores.

    Args:
        change: Called with the mask, True for hidden scores; returns those to hide in place, or None for none.
    """

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        found = _scores_and_mask(name_of(func), args, kwargs)
        if found is None:
            return NotImplemented
        scores, hidden = found
        changed = change(hidden)
        if changed is None:
            return scores.clone()
        return scores.masked_fill(changed, -1e9)  # finite: a row without keys is the mean of all

    return run


def _scores_and_mask(name: str, args: Any, kwargs: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns the scores of a call of HIDES and a mask, True for hidden ones; None for a call that hides none."""
    if name in SUMS:
        given = arguments(("input", "other"), args, kwargs)
        scores, mask = given.get("input"), given.get("other")
        if not isinstance(scores, torch.Tensor) or not isinstance(mask, torch.Tensor):
            return None
        if _is_additive(scores) and not _is_additive(mask):
            scores, mask = mask, scores
        return (scores, mask <= LOW) if _is_additive(mask) else None
    if name == "masked_fill":
        given = arguments(("input", "mask", "value"), args, kwargs)
        scores, hidden, value = given["input"], given["mask"], given["value"]
    else:
        given = arguments(("condition", "input", "other"), args, kwargs)
        if "other" not in given:
            return None
        scores, hidden, value = given["input"], ~given["condition"].bool(), given["other"]
        if not _is_low(value):
            scores, hidden, value = value, ~hidden, scores
    return (scores, hidden) if isinstance(scores, torch.Tensor) and _is_low(value) else None


def _is_low(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and float(value) <= LOW
    return isinstance(value, (int, float)) and value <= LOW


def _is_additive(mask: torch.Tensor) -> bool:
    """Returns whether a tensor has zeros, and numbers that hide scores."""
    if not mask.is_floating_point() or not mask.numel():
        return False
    low = mask <= LOW
    return bool(low.any()) and not bool(mask[~low].any())


def _moved(by: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the function that moves a mask by one key: by -1 the last key is hidden, by 1 the first is seen."""

    def move(hidden: torch.Tensor) -> torch.Tensor:
        moved = hidden.roll(by, -1)
        moved[..., 0 if by > 0 else -1] = by < 0
        return moved

    return move


def _added_as_it_is(func: Any, args: Any, kwargs: Any) -> Any:
    """Adds a mask of 0 and 1 in place of 0 and a large negative number."""
    tensors = [item for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor)]
    if len(tensors) != 2:
        return NotImplemented
    scores, mask = tensors if _is_additive(tensors[1]) else tensors[::-1]
    return scores + (mask > LOW).to(scores.dtype) if _is_additive(mask) else NotImplemented


def _turned(hidden: torch.Tensor) -> torch.Tensor | None:
    """Returns a mask with two axes of the same size exchanged, the last ones first."""
    axes = equal_axes(hidden)
    return hidden if axes is None else hidden.transpose(*axes)


def _filled(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Run:
    """Returns the variant of masked_fill that fills other elements, also with a number that hides no score."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(("input", "mask", "value"), args, kwargs)
        changed = change(given["mask"])
        return given["input"].clone() if changed is None else given["input"].masked_fill(changed, given["value"])

    return run


def _other_triangle(func: Any, args: Any, kwargs: Any) -> Any:
    given = arguments(("input", "diagonal"), args, kwargs)
    other = torch.triu if name_of(func) == "tril" else torch.tril
    return other(given["input"], -given.get("diagonal", 0))


_FILLS, _TRIANGLES = frozenset({"masked_fill"}), frozenset({"tril", "triu"})

VARIANTS: list[Variant] = [
    Variant("no attention mask in a: scores that b hides are seen", HIDES, masking(lambda hidden: None)),
    Variant("the attention mask is inverted in a", HIDES, masking(torch.logical_not)),
    Variant(
        "attention mask off by one: a hides one key more, such as the position itself", HIDES, masking(_moved(-1))
    ),
    Variant("attention mask off by one: a shows one key more, such as the next position", HIDES, masking(_moved(1))),
    Variant(
        "the attention mask of 0 and 1 is added to the scores in a: hidden keys are seen. Add 0 and -inf",
        SUMS,
        _added_as_it_is,
    ),
    Variant("the attention mask is transposed in a: queries and keys are exchanged in it", HIDES, masking(_turned)),
    Variant("masked_fill is left out in a", _FILLS, _filled(lambda mask: None)),
    Variant("the mask of masked_fill is inverted in a", _FILLS, _filled(torch.logical_not)),
    Variant("the mask of masked_fill is transposed in a: the other triangle", _FILLS, _filled(_turned)),
    Variant("tril or triu is left out in a", _TRIANGLES, left_out),
    Variant("tril and triu are exchanged in a: the other triangle", _TRIANGLES, _other_triangle),
]
