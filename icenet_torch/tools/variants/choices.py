"""What topk chooses, and weights of what it chose: as in a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch

from icenet_torch.tools.variants.variant import Run, Variant, arguments, name_of

_TOPK = frozenset({"topk"})


def _smallest(func: Any, args: Any, kwargs: Any) -> Any:
    given = arguments(("input", "k", "dim", "largest", "sorted"), args, kwargs)
    return torch.topk(**{**given, "largest": not given.get("largest", True)})


def _of_number(by: int) -> Run:
    """Returns the variant that chooses another number of elements."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(("input", "k", "dim", "largest", "sorted"), args, kwargs)
        size = given["input"].shape[given.get("dim", -1)]
        return torch.topk(**{**given, "k": given["k"] + by}) if 1 <= given["k"] + by <= size else NotImplemented

    return run


def _softmax_of_all() -> Run:
    """Returns the variant in which the softmax of chosen scores is that of all scores, taken at the chosen ones."""
    known: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        y = func(*args, **kwargs)
        if name_of(func) == "topk":
            known[:] = [(args[0] if args else kwargs["input"], *y)]
            return y
        x = args[0] if args else kwargs["input"]
        is_chosen = known and x.shape == known[0][1].shape and torch.equal(x.to(known[0][1].dtype), known[0][1])
        if not is_chosen:
            return NotImplemented
        scores, _, indices = known[0]
        return scores.to(x.dtype).softmax(-1).gather(-1, indices).to(y.dtype)

    return run


SMALLEST = Variant("topk chooses the smallest in a, the largest in b", _TOPK, _smallest)
NUMBERS = [Variant(f"topk chooses one {'more' if by > 0 else 'less'} in a", _TOPK, _of_number(by)) for by in (-1, 1)]

VARIANTS: list[Variant] = [
    Variant(
        "the softmax of all scores is taken at the chosen ones in a, in b the softmax of the chosen ones",
        frozenset({"topk", "softmax"}),
        _softmax_of_all(),
    ),
    SMALLEST,
    *NUMBERS,
]
