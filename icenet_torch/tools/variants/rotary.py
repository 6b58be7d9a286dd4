"""Rotary positions: pairs of neighbours or halves of a head, and the direction."""

from __future__ import annotations

from typing import Any

import torch

from icenet_torch.tools.variants.variant import Variant, arguments, name_of


def _pairs(func: Any, args: Any, kwargs: Any) -> Any:
    """Turns the rotation of the halves of a head into that of pairs of neighbours."""
    name = name_of(func)
    if name == "getitem":
        x, index = args
        last = index[-1] if isinstance(index, tuple) else None
        if isinstance(last, slice) and index[0] is Ellipsis and last.step in (None, 1) and x.shape[-1] % 2 == 0:
            half = x.shape[-1] // 2
            if (last.start or 0) == 0 and last.stop == half:
                return x[..., ::2]
            if last.start == half and last.stop in (None, 2 * half):
                return x[..., 1::2]
        return NotImplemented
    if name == "chunk":
        given = arguments(("input", "chunks", "dim"), args, kwargs)
        if given.get("chunks") == 2 and given.get("dim", 0) in (-1, given["input"].ndim - 1):
            return given["input"][..., ::2], given["input"][..., 1::2]
        return NotImplemented
    tensors, dim = args[0] if args else kwargs["tensors"], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if len(tensors) == 2 and tensors[0].shape == tensors[1].shape and dim in (-1, tensors[0].ndim - 1):
        return torch.stack(list(tensors), dim=-1).flatten(-2)
    return NotImplemented


def _halves(func: Any, args: Any, kwargs: Any) -> Any:
    """Turns the rotation of pairs of neighbours into that of the halves of a head."""
    name = name_of(func)
    if name == "getitem":
        x, index = args
        last = index[-1] if isinstance(index, tuple) else None
        if isinstance(last, slice) and last.step == 2:
            half = x.shape[-1] // 2
            return x[..., half:] if last.start == 1 else x[..., :half]
        return NotImplemented
    if name == "stack":
        tensors, dim = args[0] if args else kwargs["tensors"], kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if len(tensors) == 2 and dim in (-1, tensors[0].ndim):
            return torch.stack(list(tensors), dim=-2)
        return NotImplemented
    if name == "repeat_interleave":
        given = arguments(("input", "repeats", "dim"), args, kwargs)
        if given.get("repeats") == 2 and given.get("dim") in (-1, given["input"].ndim - 1):
            return torch.cat([given["input"], given["input"]], dim=-1)
        return NotImplemented
    if name == "view_as_complex":
        x = args[0]
        return func(x.reshape(*x.shape[:-2], 2, x.shape[-2]).transpose(-1, -2).contiguous())
    if name == "view_as_real":
        y = func(args[0])
        return y.transpose(-1, -2).contiguous().reshape(y.shape)
    return NotImplemented


def _negated(func: Any, args: Any, kwargs: Any) -> Any:
    return -func(*args, **kwargs)


VARIANTS: list[Variant] = [
    Variant(
        "rotary positions of pairs (x[..., ::2]) in a, of halves in b", frozenset({"getitem", "chunk", "cat"}), _pairs
    ),
    Variant(
        "rotary positions of halves in a, of pairs (x[..., ::2]) in b",
        frozenset({"getitem", "stack", "repeat_interleave", "view_as_complex", "view_as_real"}),
        _halves,
    ),
    Variant("rotary positions turn in the other direction in a: the sign of the sine", frozenset({"sin"}), _negated),
]
