"""Biases of attention that grow with the distance (ALiBi): their slopes, their sign, and the direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from icenet_torch.tools.variants.variant import Run, Variant, arguments

_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
Change = Callable[[torch.Tensor], torch.Tensor]


def _is_linear(bias: torch.Tensor) -> bool:
    """Returns whether a tensor [..., H, T, S] is linear in the key for each head, as far as it hides nothing."""
    if not bias.is_floating_point() or bias.ndim < 3 or bias.shape[-1] < 3 or bias.shape[-3] < 2:
        return False
    rows = bias[..., -1, :].double()
    second = rows[..., 2:] - 2 * rows[..., 1:-1] + rows[..., :-2]
    slopes = rows[..., 1] - rows[..., 0]
    if not bool(torch.isfinite(rows).all()) or not bool((slopes != 0).all()):
        return False
    return bool(second.abs().max() <= 1e-5 * slopes.abs().max())


def _biased(change: Change) -> Run:
    """Returns the variant of a sum or an attention with another bias of the distances."""

    def changed(item: Any) -> Any:
        return change(item) if isinstance(item, torch.Tensor) and _is_linear(item) else item

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        if getattr(func, "__name__", "") == "scaled_dot_product_attention":
            given = arguments(_ATTENTION, args, kwargs)
            mask = changed(given.get("attn_mask"))
            return NotImplemented if mask is given.get("attn_mask") else func(**{**given, "attn_mask": mask})
        new = tuple(map(changed, args)), {name: changed(item) for name, item in kwargs.items()}
        same = all(x is y for x, y in zip((*new[0], *new[1].values()), (*args, *kwargs.values()), strict=True))
        return NotImplemented if same else func(*new[0], **new[1])

    return run


def _seen(bias: torch.Tensor) -> torch.Tensor:
    """Returns which elements of a bias hide nothing."""
    return torch.isfinite(bias) & (bias > -1e4)


def _times(factor: Callable[[int], float]) -> Change:
    """Returns the bias with slopes times a factor of the number of heads."""

    def change(bias: torch.Tensor) -> torch.Tensor:
        return torch.where(_seen(bias), bias * factor(bias.shape[-3]), bias)

    return change


def _reversed(bias: torch.Tensor) -> torch.Tensor:
    return bias.flip(-3)


def _symmetric(bias: torch.Tensor) -> torch.Tensor:
    """Returns the bias that falls in both directions."""
    return torch.where(_seen(bias), -bias.abs(), bias)


def _of_numbers_from(first: int) -> Change:
    """Returns the bias with the slopes 2^(-8 i / H) of i from a first number on."""

    def change(bias: torch.Tensor) -> torch.Tensor:
        count = bias.shape[-3]
        steps = bias[..., -1, 1] - bias[..., -1, 0]
        exponents = torch.arange(first, first + count, dtype=torch.float64, device=bias.device) * (-8 / count)
        slopes = (2.0**exponents).to(bias.dtype)
        return torch.where(_seen(bias), bias * (slopes / steps.abs())[..., None, None], bias)

    return change


_NAMES = frozenset({"add", "iadd", "radd", "scaled_dot_product_attention", "baddbmm"})

VARIANTS: list[Variant] = [
    Variant(text, _NAMES, _biased(change))
    for text, change in (
        ("ALiBi has the other sign in a: scores grow with the distance", _times(lambda heads: -1.0)),
        ("the slopes of ALiBi are in the reverse order of the heads in a", _reversed),
        ("ALiBi falls in both directions in a (the absolute distance)", _symmetric),
        ("the slopes of ALiBi are 2^(-8 i / heads) of i from 0 on in a", _of_numbers_from(0)),
        ("the slopes of ALiBi are 2^(-8 i / heads) of i from 1 on in a", _of_numbers_from(1)),
        ("the slopes of ALiBi are twice as large in a", _times(lambda heads: 2.0)),
        ("the slopes of ALiBi are half as large in a", _times(lambda heads: 0.5)),
        ("ALiBi is left out in a", _times(lambda heads: 0.0)),
    )
]
