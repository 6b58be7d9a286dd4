"""Variances and norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from icenet_torch.tools.variants.variant import Run, Variant, arguments


def _variance(correction: int) -> Run:
    """Returns the variant of var and std with another correction, the number that is subtracted from the count."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        flags = [item for item in args[1:] if isinstance(item, bool)]  # unbiased and keepdim
        dim = kwargs.get("dim", next((item for item in args[1:] if not isinstance(item, bool)), None))
        is_unbiased = flags[0] if flags else kwargs.get("unbiased", kwargs.get("correction", 1) not in (0, None))
        if int(bool(is_unbiased)) == correction:
            return NotImplemented
        keepdim = flags[1] if len(flags) > 1 else kwargs.get("keepdim", False)
        return func(args[0], dim=dim, correction=correction, keepdim=keepdim)

    return run


def _variance_and_mean(correction: int) -> Run:
    """Returns the variant of var_mean with another correction."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        variance = _variance(correction)(torch.var, args, kwargs)
        return NotImplemented if variance is NotImplemented else (variance, func(*args, **kwargs)[1])

    return run


def _hand_written_norm(change: Callable[[torch.Tensor, float], torch.Tensor]) -> Run:
    """Returns the variant of layer_norm with another quotient, given the deviations from the mean, and eps."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(("input", "shape", "weight", "bias", "eps"), args, kwargs)
        shape: Any = given.get("normalized_shape", given.get("shape"))
        x, axes = given["input"], tuple(range(-len(shape), 0))
        if len(axes) > 1:
            return NotImplemented
        y = change(x - x.mean(axes, keepdim=True), given.get("eps", 1e-5))
        y = y if given.get("weight") is None else y * given["weight"]
        return y if given.get("bias") is None else y + given["bias"]

    return run


def _variance_of(x: torch.Tensor, ddof: int = 0) -> torch.Tensor:
    """Returns the variance over the last axis of values whose mean is 0."""
    return x.square().sum(-1, keepdim=True) / (x.shape[-1] - ddof)


def _rms_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """Leaves out the mean of a layer norm."""
    given = arguments(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs)
    x, eps = given["input"], given.get("eps", 1e-5)
    if len(given["normalized_shape"]) > 1:
        return NotImplemented
    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if given.get("weight") is None else y * given["weight"]
    return y if given.get("bias") is None else y + given["bias"]


_VARIANCES = frozenset({"var", "std"})
_NORM = frozenset({"layer_norm"})

VARIANTS: list[Variant] = [
    Variant("RMS norm in a, layer norm in b: the mean is not subtracted in a", _NORM, _rms_norm),
    Variant("biased variance (ddof 0) in a, unbiased in b", _VARIANCES, _variance(0)),
    Variant("unbiased variance (ddof 1) in a, biased in b", _VARIANCES, _variance(1)),
    Variant("biased variance (ddof 0) in a, unbiased in b", frozenset({"var_mean"}), _variance_and_mean(0)),
    Variant("unbiased variance (ddof 1) in a, biased in b", frozenset({"var_mean"}), _variance_and_mean(1)),
    Variant(
        "unbiased variance (ddof 1) in a, biased in b",
        _NORM,
        _hand_written_norm(lambda x, eps: x / (_variance_of(x, 1) + eps).sqrt()),
    ),
    Variant(
        "eps is added to the standard deviation in a, to the variance in b",
        _NORM,
        _hand_written_norm(lambda x, eps: x / (_variance_of(x).sqrt() + eps)),
    ),
    Variant(
        "unbiased standard deviation plus eps in a, biased variance plus eps in b",
        _NORM,
        _hand_written_norm(lambda x, eps: x / (_variance_of(x, 1).sqrt() + eps)),
    ),
]
