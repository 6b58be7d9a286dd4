"""Losses that a module computes: their reduction, and the labels that they leave out."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from icenet_torch.tools.variants.variant import Run, Variant

_LOSSES = frozenset(
    {"cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div"}
    | {"binary_cross_entropy", "binary_cross_entropy_with_logits"}
)


def _reduced(reduction: str) -> Run:
    """Returns the variant of a loss with another reduction of its terms."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        before = kwargs.get("reduction", "mean")
        return NotImplemented if before == reduction else func(*args, **{**kwargs, "reduction": reduction})

    return run


def _labels(counts: bool) -> Run:
    """Returns the variant of a cross-entropy in which labels that are left out are 0, or count as a loss of 0."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        scores, labels = (*args, *(kwargs[n] for n in ("input", "target") if n in kwargs))[:2]
        left_out = labels == kwargs.get("ignore_index", -100)
        if not bool(left_out.any()):
            return NotImplemented
        if counts and kwargs.get("ignore_index", -100) >= 0:
            return func(scores, labels, **{**kwargs, "ignore_index": -100})
        if counts:
            return func(scores, labels.masked_fill(left_out, 0), **kwargs)
        return func(scores, labels, **{**kwargs, "reduction": "sum"}) / labels.numel()

    return run


def _other_labels(func: Any, args: Any, kwargs: Any) -> Any:
    """Exchanges the labels 1 and 0."""
    if len(args) < 2 or not isinstance(args[1], torch.Tensor) or not bool(((args[1] >= 0) & (args[1] <= 1)).all()):
        return NotImplemented
    return func(args[0], 1 - args[1], *args[2:], **kwargs)


def _of_probabilities(func: Any, args: Any, kwargs: Any) -> Any:
    """Takes the scores for logarithms of probabilities."""
    return F.nll_loss(*args, **{name: item for name, item in kwargs.items() if name != "label_smoothing"})


def _of_distance(name: str) -> Run:
    """Returns the variant of a loss of the distance between two arrays that is another one."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        return getattr(F, name)(*args, **{key: item for key, item in kwargs.items() if key in _DISTANCE_OPTIONS})

    return run


_DISTANCE_OPTIONS = ("input", "target", "reduction")
_DISTANCES = {
    "mse_loss": "the squared error",
    "l1_loss": "the absolute error",
    "smooth_l1_loss": "the smooth L1 loss",
}


def _sharp(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **{**kwargs, "label_smoothing": 0.0}) if kwargs.get("label_smoothing") else NotImplemented


_BINARY = frozenset({"binary_cross_entropy", "binary_cross_entropy_with_logits"})
_ENTROPY = frozenset({"cross_entropy", "nll_loss"})

VARIANTS: list[Variant] = [
    *(
        Variant(f"{ours} in a, {theirs} in b", frozenset({old}), _of_distance(new))
        for old, theirs in _DISTANCES.items()
        for new, ours in _DISTANCES.items()
        if new != old
    ),
    Variant("the loss is the sum of its terms in a, not in b", _LOSSES, _reduced("sum")),
    Variant("the loss is the mean of its terms in a, not in b", _LOSSES, _reduced("mean")),
    Variant("labels that are left out (ignore_index) count in a, negative ones as label 0", _ENTROPY, _labels(True)),
    Variant(
        "the loss is divided by the number of all labels in a, by that of those not left out (ignore_index) in b",
        _ENTROPY,
        _labels(False),
    ),
    Variant("label smoothing is left out in a", frozenset({"cross_entropy"}), _sharp),
    Variant("the labels 1 and 0 are exchanged in a", _BINARY, _other_labels),
    Variant("no softmax in the cross-entropy of a", frozenset({"cross_entropy"}), _of_probabilities),
]
