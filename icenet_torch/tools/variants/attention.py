"""Attention: its scale, its mask and the axis of its softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from icenet_torch.tools.variants.variant import Run, Variant, arguments, name_of

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def _attention(change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Run:
    """Returns the variant of scaled_dot_product_attention with changed options."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        changed = change(arguments(_ARGUMENTS, args, kwargs))
        return NotImplemented if changed is None else func(**changed)

    return run


def _with_scale(power: float) -> Run:
    """Returns the variant with the scale size**power, of the size of a head."""

    def change(options: dict[str, Any]) -> dict[str, Any]:
        size = options["query"].shape[-1]
        return {**options, "scale": float(size) ** power}

    return _attention(change)


def _with_scale_of_all(options: dict[str, Any]) -> dict[str, Any] | None:
    """Changes the scale to that of the width of all heads."""
    query = options["query"]
    return {**options, "scale": float(query.shape[1] * query.shape[-1]) ** -0.5} if query.ndim == 4 else None


def _with_mask(diagonal: int | None) -> Run:
    """Returns the variant with a causal mask that ends at a diagonal, as in `torch.tril`; None is no mask."""

    def change(options: dict[str, Any]) -> dict[str, Any] | None:
        if not options.get("is_causal") and options.get("attn_mask") is None:
            if diagonal is None:
                return None
        elif diagonal is None:
            return {**options, "is_causal": False, "attn_mask": None}
        n, m = options["query"].shape[-2], options["key"].shape[-2]
        mask = torch.ones(n, m, dtype=torch.bool).tril(diagonal).to(options["query"].device)
        mask = mask | ~mask.any(-1, keepdim=True)  # a row without keys is the mean of all values elsewhere, too
        return {**options, "is_causal": False, "attn_mask": mask}

    return _attention(change)


def _added(options: dict[str, Any]) -> dict[str, Any] | None:
    """Adds the mask of 1 and 0 to the scores."""
    mask = options.get("attn_mask")
    query = options["query"]
    if options.get("is_causal"):
        mask = torch.ones(query.shape[-2], options["key"].shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return None
    return {**options, "is_causal": False, "attn_mask": mask.to(query.dtype)}


def _with_strict_mask() -> Run:
    """Returns the variant in which a position does not attend to itself; the first one attends to all."""

    def change(options: dict[str, Any]) -> dict[str, Any]:
        n, m = options["query"].shape[-2], options["key"].shape[-2]
        mask = torch.ones(n, m, dtype=torch.bool).tril(-1)
        mask[0] = torch.arange(m) <= m  # a finite -1e9 in all places of a row has no effect
        return {**options, "is_causal": False, "attn_mask": mask.to(options["query"].device)}

    return _attention(change)


def _diagonal(by: int) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = dict(kwargs)
        diagonal = given.pop("diagonal", args[1] if len(args) > 1 else 0)
        return func(args[0], diagonal=diagonal + by, **given)

    return run


def _softmax(dim: int) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        if x.ndim < -dim:
            return NotImplemented
        return torch.log_softmax(x, dim) if name_of(func) == "log_softmax" else torch.softmax(x, dim)

    return run


def _over_queries(func: Any, args: Any, kwargs: Any) -> Any:
    """Computes the attention with a softmax over the queries."""
    given = arguments(_ARGUMENTS, args, kwargs)
    query, key = given["query"], given["key"]
    scores = query @ key.transpose(-1, -2) * (given.get("scale") or query.shape[-1] ** -0.5)
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -2) @ given["value"]


_SDPA = frozenset({"scaled_dot_product_attention"})

VARIANTS: list[Variant] = [
    Variant("attention scale 1 / size in a, 1 / sqrt(size) in b", _SDPA, _with_scale(-1.0)),
    Variant("attention without a scale in a, with 1 / sqrt(size) in b", _SDPA, _with_scale(0.0)),
    Variant("attention scale 1 / size^(1/4) in a, 1 / sqrt(size) in b", _SDPA, _with_scale(-0.25)),
    Variant("attention scale sqrt(size) in a, 1 / sqrt(size) in b", _SDPA, _with_scale(0.5)),
    Variant(
        "attention scale 1 / sqrt(size of all heads) in a, 1 / sqrt(size of one) in b",
        _SDPA,
        _attention(_with_scale_of_all),
    ),
    Variant("softmax of the attention over the queries in a, over the keys in b", _SDPA, _over_queries),
    Variant("no attention mask in a", _SDPA, _with_mask(None)),
    Variant(
        "the attention mask of 0 and 1 is added to the scores in a: hidden keys are seen. Add 0 and -inf",
        _SDPA,
        _attention(_added),
    ),
    Variant("a causal attention mask in a, none in b", _SDPA, _with_mask(0)),
    Variant("attention mask off by one: a hides the position itself", _SDPA, _with_strict_mask()),
    Variant(
        "attention mask off by one: a hides the position itself (rows without keys see all)", _SDPA, _with_mask(-1)
    ),
    Variant("attention mask off by one: a shows the next position", _SDPA, _with_mask(1)),
    Variant(
        "mask off by one: the diagonal of triu or tril is one higher in a", frozenset({"triu", "tril"}), _diagonal(1)
    ),
    Variant(
        "mask off by one: the diagonal of triu or tril is one lower in a", frozenset({"triu", "tril"}), _diagonal(-1)
    ),
    *(
        Variant(f"softmax over the axis {dim} in a", frozenset({"softmax", "log_softmax"}), _softmax(dim))
        for dim in (-1, -2, -3)
    ),
]
