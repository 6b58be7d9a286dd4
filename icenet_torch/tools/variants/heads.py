"""Heads of attention: how keys and values are repeated for groups of queries, and which axes are exchanged."""

from __future__ import annotations

from typing import Any

import torch

from icenet_torch.tools.variants.variant import Variant, arguments

_TILED = "elements, such as heads, repeated in turn (tile) in a, each several times (repeat_interleave) in b"
_INTERLEAVED = "elements, such as heads, each repeated several times (repeat) in a, in turn (tile) in b"


def _in_turn(func: Any, args: Any, kwargs: Any) -> Any:
    given = arguments(("input", "repeats", "dim"), args, kwargs)
    if not isinstance(given.get("repeats"), int) or given.get("dim") is None:
        return NotImplemented
    return torch.cat([given["input"]] * given["repeats"], dim=given["dim"])


def _each(func: Any, args: Any, kwargs: Any) -> Any:
    """Repeats each part of an axis several times, where the whole axis is repeated."""
    x = args[0] if args else kwargs["input"]
    sizes = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:]
    sizes = tuple(sizes) or tuple(kwargs.get("repeats", kwargs.get("dims", ())))
    repeated = [axis for axis, count in enumerate(sizes) if count > 1]
    if len(sizes) != x.ndim or len(repeated) != 1 or x.shape[repeated[0]] == 1:
        return NotImplemented
    return x.repeat_interleave(sizes[repeated[0]], repeated[0])


def _each_of_list(func: Any, args: Any, kwargs: Any) -> Any:
    """Repeats each part of an axis several times, where an array is concatenated with itself."""
    given = arguments(("tensors", "dim"), args, kwargs)
    tensors = list(given["tensors"])
    if len(tensors) < 2 or any(tensor is not tensors[0] for tensor in tensors):
        return NotImplemented
    return tensors[0].repeat_interleave(len(tensors), given.get("dim", 0))


def _merged(func: Any, args: Any, kwargs: Any) -> Any:
    """Merges an axis that `expand` repeats with its neighbour in the other order."""
    x, y = args[0], func(*args, **kwargs)
    if not isinstance(x, torch.Tensor) or y.ndim != x.ndim - 1:
        return NotImplemented
    for axis in range(1, x.ndim - 1):
        whole = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
        is_repeated = 0 in x.stride()[axis : axis + 2] and 1 not in x.shape[axis : axis + 2]
        if tuple(y.shape) == whole and is_repeated:
            return x.transpose(axis, axis + 1).reshape(whole)
    return NotImplemented


def _grouped_in_turn(func: Any, args: Any, kwargs: Any) -> Any:
    """Repeats keys and values in turn where scaled_dot_product_attention repeats each several times."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = arguments(names, args, kwargs)
    if not given.get("enable_gqa") or given["query"].ndim < 4:
        return NotImplemented
    count = given["query"].shape[-3] // given["key"].shape[-3]
    repeated = {name: torch.cat([given[name]] * count, dim=-3) for name in ("key", "value")}
    return func(**{**given, **repeated, "enable_gqa": False})


def _not_exchanged(func: Any, args: Any, kwargs: Any) -> Any:
    """Leaves out a transpose of the two axes after the first."""
    x = args[0] if args else kwargs["input"]
    axes = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:]
    axes = tuple(axis % x.ndim for axis in axes) or tuple(kwargs.get("dims", ()))
    if x.ndim != 4 or axes not in ((1, 2), (2, 1), (0, 2, 1, 3)):
        return NotImplemented
    return x


REPEATED = Variant(_TILED, frozenset({"repeat_interleave"}), _in_turn)
"""Tried before rotary positions, which are of pairs with this function, and of halves without."""
VARIANTS: list[Variant] = [
    Variant(_TILED, frozenset({"scaled_dot_product_attention"}), _grouped_in_turn),
    Variant(
        "heads repeated in the other order in a: keys and values are repeated in turn (tile) on one side, each "
        "several times (repeat) on the other",
        frozenset({"view", "reshape", "flatten"}),
        _merged,
    ),
    Variant(_INTERLEAVED, frozenset({"repeat", "tile"}), _each),
    Variant(_INTERLEAVED, frozenset({"cat", "concat", "concatenate"}), _each_of_list),
    Variant(
        "swapped axes: heads and positions are not exchanged in a (x.transpose(0, 2, 1, 3)), so it attends over "
        "the heads of a position",
        frozenset({"transpose", "permute", "swapaxes"}),
        _not_exchanged,
    ),
]
