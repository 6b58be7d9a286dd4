"""Casts to fp32 that are left out."""

from __future__ import annotations

from typing import Any

import torch

from icenet_torch.tools.variants.variant import Run, Variant, arguments, name_of


def _uncast(half: torch.dtype) -> Run:
    """Returns the variant that leaves out a cast to fp32; integers become numbers of half precision."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        is_cast = name_of(func) in ("float", "to", "type") and not args[0].is_floating_point()
        if is_cast and (name_of(func) == "float" or torch.float32 in (*args[1:], *kwargs.values())):
            return args[0].to(half)
        return _left_in_half(func, args, kwargs)

    return run


def _left_in_half(func: Any, args: Any, kwargs: Any) -> Any:
    name, x = name_of(func), args[0]
    if name == "float":
        return x
    dtypes = [item for item in (*args[1:], *kwargs.values()) if isinstance(item, torch.dtype)]
    if name in ("to", "type"):
        is_half = x.dtype in (torch.float16, torch.bfloat16)
        return x if is_half and torch.float32 in dtypes else NotImplemented
    if torch.float32 in dtypes:
        kept = {key: item for key, item in kwargs.items() if item is not torch.float32}
        return func(*(item for item in args if item is not torch.float32), **kept)
    return NotImplemented


def _rounded_softmax(func: Any, args: Any, kwargs: Any) -> Any:
    given = arguments(("input", "dim"), args, kwargs)
    x, dim = given["input"], given["dim"]
    e = (x - x.amax(dim, keepdim=True)).exp()
    return e / e.cumsum(dim).narrow(dim, x.shape[dim] - 1, 1)


def _rounded_norm(func: Any, args: Any, kwargs: Any) -> Any:
    given = arguments(("input", "shape", "weight", "bias", "eps"), args, kwargs)
    x, eps = given["input"], given.get("eps") or 1e-5
    if name_of(func) == "layer_norm":
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    y = y if given.get("weight") is None else y * given["weight"]
    return y if given.get("bias") is None else y + given["bias"]


def casts(dtype: str) -> list[Variant]:
    """Returns the variants without a cast to fp32 that a port in bf16 or fp16 may lack."""
    return [
        Variant(
            f"a cast to fp32 is missing: a computes in {dtype} what b computes in fp32",
            frozenset({"float", "to", "type", "softmax", "sum", "mean", "log_softmax"}),
            _uncast(torch.bfloat16 if dtype == "bf16" else torch.float16),
        ),
        Variant(
            f"softmax is computed in {dtype} in a, in fp32 in b: pass precise=True",
            frozenset({"softmax"}),
            _rounded_softmax,
        ),
        Variant(
            f"a norm is computed in {dtype} in a, in fp32 in b", frozenset({"layer_norm", "rms_norm"}), _rounded_norm
        ),
    ]
