"""Single operations: left out, reversed, of another kind, or in TF32."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from icenet_torch.tools.variants import terms
from icenet_torch.tools.variants.variant import Run, Variant, arguments, equal_axes, left_out, name_of


def _bias(factor: float) -> Run:
    """Returns the variant whose bias is multiplied by a factor."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = list(args)
        bias = kwargs.get("bias", given[2] if len(given) > 2 else None)
        if bias is None:
            return NotImplemented
        if "bias" in kwargs:
            return func(*given, **{**kwargs, "bias": bias * factor})
        given[2] = bias * factor
        return func(*given, **kwargs)

    return run


def _in_tf32(func: Any, args: Any, kwargs: Any) -> Any:
    given = [
        _tf32(a) if isinstance(a, torch.Tensor) and a.is_floating_point() and i < 2 else a for i, a in enumerate(args)
    ]
    return func(*given, **kwargs)


def _tf32(x: torch.Tensor) -> torch.Tensor:
    """Returns values rounded to the 10 bits of TF32's mantissa, to the nearest and halves to even."""
    bits = x.float().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32).to(x.dtype)


def _reversed_list(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = args[0] if args else kwargs["tensors"]
    rest = {k: v for k, v in kwargs.items() if k != "tensors"}
    return func(list(tensors)[::-1], *args[1:], **rest)


def _reversed_parts(func: Any, args: Any, kwargs: Any) -> Any:
    parts = func(*args, **kwargs)
    return tuple(parts)[::-1]


def _ordered_list(order: Callable[[int], Sequence[int]]) -> Run:
    """Returns the variant of a concatenation whose parts are in another order, given their number."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        tensors = list(args[0] if args else kwargs["tensors"])
        chosen = order(len(tensors))
        if len(tensors) < 3 or sorted(chosen) != list(range(len(tensors))):
            return NotImplemented
        rest = {k: v for k, v in kwargs.items() if k != "tensors"}
        return func([tensors[i] for i in chosen], *args[1:], **rest)

    return run


def _in_pairs(first: int) -> Callable[[int], Sequence[int]]:
    """Returns the order in which neighbours are exchanged, from a part on."""

    def order(count: int) -> Sequence[int]:
        return [i if i < first else first + ((i - first) ^ 1) for i in range(count)]

    return order


def _ordered_parts(order: Sequence[int]) -> Run:
    """Returns the variant of a split whose parts are taken in another order."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        parts = tuple(func(*args, **kwargs))
        if len(parts) != len(order) or any(
            parts[i].shape != part.shape for i, part in zip(order, parts, strict=True)
        ):
            return NotImplemented
        return tuple(parts[i] for i in order)

    return run


def _split_otherwise(order: Sequence[int]) -> Run:
    """Returns the variant of a reshape that splits the last axis into its factors in another order."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        y, count = func(*args, **kwargs), len(order)
        lead = y.shape[: y.ndim - count]
        if args[0].shape[:-1] != lead or y.ndim != args[0].ndim + count - 1 or 1 in y.shape[-count:]:
            return NotImplemented
        sizes = [y.shape[len(lead) + i] for i in order]
        back = [len(lead) + list(order).index(i) for i in range(count)]
        return args[0].reshape(*lead, *sizes).permute(*range(len(lead)), *back)

    return run


def _merged_otherwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Merges the last two axes in the reverse order."""
    x, y = args[0], func(*args, **kwargs)
    if not isinstance(x, torch.Tensor) or x.ndim < 2 or 1 in x.shape[-2:] or y.ndim >= x.ndim:
        return NotImplemented
    return x.transpose(-1, -2).reshape(y.shape) if y.shape[-1] == x.shape[-1] * x.shape[-2] else NotImplemented


def _reshaped(func: Any, args: Any, kwargs: Any) -> Any:
    """Reshapes where axes are exchanged."""
    y = func(*args, **kwargs)
    return args[0].reshape(y.shape) if args and args[0].ndim > 2 else NotImplemented


def _other_half(func: Any, args: Any, kwargs: Any) -> Any:
    given = arguments(("input", "dim"), args, kwargs)
    dim = given.get("dim", -1)
    return func(torch.cat(given["input"].chunk(2, dim)[::-1], dim), dim)


def _rolled_back(func: Any, args: Any, kwargs: Any) -> Any:
    given = arguments(("input", "shifts", "dims"), args, kwargs)
    shifts = given["shifts"]
    return func(
        given["input"], tuple(-n for n in shifts) if isinstance(shifts, tuple) else -shifts, given.get("dims")
    )


def _unchanged(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs["input"]


def _squared(func: Any, args: Any, kwargs: Any) -> Any:
    return _unchanged(func, args, kwargs).square()


def _absolute(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].abs() if len(args) == 2 and args[1] == 2 else NotImplemented


def _transposed(place: int) -> Run:
    """Returns the variant of a product that exchanges two axes of a factor of the same size, the last ones first."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        factors = [item for item in args if isinstance(item, torch.Tensor)]
        x = factors[place] if place < len(factors) else None
        axes = None if x is None else equal_axes(x)
        if x is None or axes is None or (name_of(func) != "einsum" and axes != (x.ndim - 2, x.ndim - 1)):
            return NotImplemented
        return func(*(x.transpose(*axes) if item is x else item for item in args), **kwargs)

    return run


def _exchanged(func: Any, args: Any, kwargs: Any) -> Any:
    both = len(args) == 2 and all(isinstance(item, torch.Tensor) for item in args)
    return func(args[1], args[0], **kwargs) if both else NotImplemented


def _scaled_scores(func: Any, args: Any, kwargs: Any) -> Any:
    """Multiplies a product of queries and keys by 1 / sqrt(size)."""
    y = func(*args, **kwargs)
    x = next((item for item in args if isinstance(item, torch.Tensor)), None)
    return y * x.shape[-1] ** -0.5 if x is not None and y.ndim > 2 else NotImplemented


def _uncut(func: Any, args: Any, kwargs: Any) -> Any:
    """Leaves out slices that cut the first or the last elements off."""
    x, index = args
    items = index if isinstance(index, tuple) else (index,)
    cuts = [
        isinstance(i, slice) and i.step in (None, 1) and ((i.start or 0) > 0) != (i.stop is not None and i.stop < 0)
        for i in items
    ]
    if not any(cuts):
        return NotImplemented
    return func(x, tuple(slice(None) if cut else item for cut, item in zip(cuts, items, strict=True)))


def _softmax(func: Any, args: Any, kwargs: Any) -> Any:
    x = _unchanged(func, args, kwargs)
    return torch.softmax(x, -1) if x.ndim and x.shape[-1] > 1 else NotImplemented


def _sigmoid(func: Any, args: Any, kwargs: Any) -> Any:
    return torch.sigmoid(_unchanged(func, args, kwargs))


def _over_chosen(func: Any, args: Any, kwargs: Any) -> Any:
    """Divides what topk returns by its sum."""
    found = func(*args, **kwargs)
    values, indices = found
    return values / values.sum(-1, keepdim=True), indices


def _by_which_topk_chooses() -> Run:
    """Returns the variant that takes what topk returns, where other values are gathered at its indices."""
    chosen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        y = func(*args, **kwargs)
        if name_of(func) == "topk":
            chosen[:] = [(y[0], y[1])]
            return y
        index = next((item for item in args[1:] if isinstance(item, torch.Tensor)), kwargs.get("index"))
        return chosen[0][0] if chosen and index is chosen[0][1] else NotImplemented

    return run


def _split_from_end(func: Any, args: Any, kwargs: Any) -> Any:
    """Takes parts of unequal sizes from the other end."""
    given = arguments(("input", "split_size_or_sections", "dim"), args, kwargs)
    sizes = given.get("split_size_or_sections", given.get("split_size"))
    if not isinstance(sizes, (list, tuple)) or list(sizes) == list(sizes)[::-1]:
        return NotImplemented
    return func(given["input"], list(sizes)[::-1], dim=given.get("dim", 0))[::-1]


def _without_part(last: bool) -> Run:
    """Returns the variant of a concatenation without its first or its last part."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(("tensors", "dim"), args, kwargs)
        parts = given["tensors"]
        return func(parts[:-1] if last else parts[1:], given.get("dim", 0)) if len(parts) > 1 else NotImplemented

    return run


def _without_effect(func: Any, args: Any, kwargs: Any) -> Any:
    """Hides the last part of a concatenation from a softmax."""
    given = arguments(("tensors", "dim"), args, kwargs)
    parts = list(given["tensors"])
    if len(parts) < 2 or not parts[-1].is_floating_point():
        return NotImplemented
    return func([*parts[:-1], torch.full_like(parts[-1], -1e9)], given.get("dim", 0))


def _without_bound(name: str) -> Run:
    """Returns the variant of a clamp with two bounds that has no `min`, or no `max`."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(("input", "min", "max"), args, kwargs)
        has_both = given.get("min") is not None and given.get("max") is not None
        return torch.clamp(**{**given, name: None}) if has_both else NotImplemented

    return run


def _both_bounds(func: Any, args: Any, kwargs: Any) -> Any:
    """Takes the negative of the only bound as the other one."""
    given = arguments(("input", "min", "max"), args, kwargs)
    low, high = given.get("min"), given.get("max")
    bound = high if low is None else low
    if (low is None) == (high is None) or not isinstance(bound, (int, float)) or not bound:
        return NotImplemented
    return torch.clamp(given["input"], -abs(bound), abs(bound))


def _also_exchanged(i: int, j: int) -> Run:
    """Returns the variant of a permutation that exchanges two axes in addition."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        y = func(*args, **kwargs)
        return y.transpose(i, j) if y.ndim > j and min(y.shape[i], y.shape[j]) > 1 else NotImplemented

    return run


def _summed(kind: str) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(("input", "dim", "keepdim"), args, kwargs)
        dim = given.get("dim")
        if kind == "amax":
            return torch.amax(given["input"], dim=() if dim is None else dim, keepdim=bool(given.get("keepdim")))
        options = {} if dim is None else {"dim": dim, "keepdim": bool(given.get("keepdim"))}
        return getattr(torch, kind)(given["input"], **options)

    return run


def _left_out(func: Any, args: Any, kwargs: Any) -> Any:
    """Leaves out the second operand of an operation on two tensors."""
    tensors = [item for item in args[:2] if isinstance(item, torch.Tensor) and item.is_floating_point()]
    if len(tensors) < 2:
        return NotImplemented
    shape = torch.broadcast_shapes(tensors[0].shape, tensors[1].shape)
    return tensors[0].expand(shape).clone()


def _left_out_first(func: Any, args: Any, kwargs: Any) -> Any:
    return _left_out(func, args[1::-1], kwargs)


def _interleaved(func: Any, args: Any, kwargs: Any) -> Any:
    """Takes the parts of a concatenation along the last axis element by element."""
    given = arguments(("tensors", "dim"), args, kwargs)
    parts, dim = list(given["tensors"]), given.get("dim", given.get("axis", 0))
    if len(parts) < 2 or dim not in (-1, parts[0].ndim - 1) or len({part.shape for part in parts}) > 1:
        return NotImplemented
    return torch.stack(parts, -1).flatten(-2)


def _side_by_side(func: Any, args: Any, kwargs: Any) -> Any:
    """Takes one part of a stack after the other."""
    given = arguments(("tensors", "dim"), args, kwargs)
    parts, dim = list(given["tensors"]), given.get("dim", 0)
    y = func(*args, **kwargs)
    is_last = len(parts) > 1 and parts[0].ndim and dim in (-1, parts[0].ndim)
    return torch.stack(parts, -2).reshape(y.shape) if is_last else NotImplemented


_CAT = frozenset({"cat", "concat", "concatenate", "stack"})
_LISTS = _CAT - {"stack"}
_SPLITS = frozenset({"chunk", "split", "unbind", "tensor_split"})
_RESHAPE = frozenset({"view", "reshape", "unflatten"})
_CONVS = frozenset({"conv1d", "conv2d", "conv3d"})
_CLAMPS = frozenset({"clamp", "clip", "clamp_min", "clamp_max"})
_TOPK, _GETITEM = frozenset({"topk"}), frozenset({"getitem"})
_PRODUCTS = _CONVS | {"linear", "matmul", "bmm", "einsum", "scaled_dot_product_attention"}

VARIANTS: list[Variant] = [
    Variant("no bias in a", _CONVS | {"linear"}, _bias(0.0)),
    Variant("the bias is added twice in a", _CONVS | {"linear"}, _bias(2.0)),
    Variant(
        "the parts are concatenated in the reverse order in a",
        _CAT,
        _reversed_list,
    ),
    Variant("the parts of a split are in the reverse order in a", _SPLITS, _reversed_parts),
    *(
        Variant(f"the parts of a split are in another order in a: {list(order)}", _SPLITS, _ordered_parts(order))
        for count in (3, 4)
        for order in itertools.permutations(range(count))
        if order not in (tuple(range(count)), tuple(range(count))[::-1])
    ),
    Variant("a split takes its parts from the other end in a", frozenset({"split"}), _split_from_end),
    Variant("the halves of GLU are exchanged in a", frozenset({"glu"}), _other_half),
    Variant("the first part is concatenated last in a", _CAT, _ordered_list(lambda n: [*range(1, n), 0])),
    Variant("the last part is concatenated first in a", _CAT, _ordered_list(lambda n: [n - 1, *range(n - 1)])),
    *(
        Variant(f"neighbouring parts are concatenated in the reverse order in a{text}", _CAT, _ordered_list(order))
        for text, order in (("", _in_pairs(0)), (", from the second on", _in_pairs(1)))
    ),
    *(
        Variant(f"a reshape splits the last axis in another order in a: its parts {list(order)}", _RESHAPE, run)
        for count in (2, 3)
        for order in itertools.permutations(range(count))
        if order != tuple(range(count))
        for run in (_split_otherwise(order),)
    ),
    Variant(
        "a reshape merges the last two axes in the reverse order in a", _RESHAPE | {"flatten"}, _merged_otherwise
    ),
    Variant(
        "swapped axes: reshaped in a, transposed in b",
        frozenset({"transpose", "permute", "swapaxes", "movedim"}),
        _reshaped,
    ),
    *(
        Variant(f"a permute exchanges the axes {i} and {j} in addition in a", frozenset({"permute"}), run)
        for i, j in itertools.combinations(range(1, 6), 2)
        for run in (_also_exchanged(i, j),)
    ),
    *(
        Variant(f"the {'last' if last else 'first'} part of a concatenation is left out in a", _LISTS, run)
        for last in (True, False)
        for run in (_without_part(last),)
    ),
    Variant("a roll in the other direction in a", frozenset({"roll"}), _rolled_back),
    Variant("a roll is left out in a", frozenset({"roll"}), _unchanged),
    Variant("softmax in a, sigmoid in b", frozenset({"sigmoid"}), _softmax),
    Variant("sigmoid in a, softmax in b", frozenset({"softmax"}), _sigmoid),
    Variant("no softmax in a", frozenset({"softmax"}), _unchanged),
    Variant("the values of topk are divided by their sum in a, such as by a softmax of them", _TOPK, _over_chosen),
    Variant(
        "the values by which topk chooses are taken in a, such as scores with a bias, in b those at its indices",
        frozenset({"topk", "gather", "take_along_dim"}),
        _by_which_topk_chooses(),
    ),
    Variant("the diagonal is not filled in a", frozenset({"fill_diagonal"}), _unchanged),
    Variant("normalization to unit length is left out in a", frozenset({"normalize"}), _unchanged),
    Variant(
        "slices that cut off the first or the last elements, as of shifted labels, are left out in a",
        _GETITEM,
        _uncut,
    ),
    Variant("exp is left out in a", frozenset({"exp"}), _unchanged),
    Variant("the square in a, the absolute value in b", frozenset({"abs"}), _squared),
    Variant("the other sign of a difference in a", frozenset({"sub", "rsub"}), _exchanged),
    Variant("the absolute value in a, the square in b", frozenset({"pow"}), _absolute),
    *(
        Variant(
            f"the {text} factor of a product is transposed in a",
            frozenset({"matmul", "mm", "bmm", "einsum"}),
            _transposed(place),
        )
        for place, text in enumerate(("first", "second"))
    ),
    Variant(
        "attention scores are multiplied by 1 / sqrt(size) in a, not scaled in b",
        frozenset({"matmul", "bmm", "baddbmm"}),
        _scaled_scores,
    ),
    Variant("the sequence is not reversed in a", frozenset({"flip"}), left_out),
    Variant("sum in a, mean in b", frozenset({"mean"}), _summed("sum")),
    Variant("maximum in a, mean in b", frozenset({"mean"}), _summed("amax")),
    Variant("mean in a, sum in b", frozenset({"sum"}), _summed("mean")),
    Variant("argmax in a, argmin in b", frozenset({"argmin"}), _summed("argmax")),
    Variant("argmin in a, argmax in b", frozenset({"argmax"}), _summed("argmin")),
    Variant(
        "the last part of a concatenation has no effect in a, as of a sink of attention", _LISTS, _without_effect
    ),
    Variant("bounded on both sides in a, on one side in b", _CLAMPS, _both_bounds),
    *terms.VARIANTS,
    Variant("a quotient is left out in a", frozenset({"div", "truediv"}), _left_out),
    *(
        Variant(f"a {what} is left out in a", frozenset({name, f"i{name}"}), run)
        for name, what in (("mul", "product"), ("add", "sum"))
        for run in (_left_out, _left_out_first)
    ),
    Variant("products in TF32 in a, whose precision is 10 bits: set MLX_ENABLE_TF32=0", _PRODUCTS, _in_tf32),
]

UNBOUNDED = [
    *(  # before both: a bound that no value reaches may be there
        Variant(f"the {text} bound is left out in a", _CLAMPS, _without_bound(name))
        for text, name in (("lower", "min"), ("upper", "max"))
    ),
    Variant("bounds are left out in a", _CLAMPS, left_out),
]
"""Tried after the bounds that stand in the code of `a`, which values may not reach."""
LARGEST = Variant("maximum in a, sum in b", frozenset({"sum"}), _summed("amax"))
INTERLEAVED = [
    Variant(
        "parts are interleaved element by element in a (stack), one after the other in b (cat)", _LISTS, _interleaved
    ),
    Variant(
        "parts are one after the other in a (cat), interleaved element by element in b (stack)",
        frozenset({"stack"}),
        _side_by_side,
    ),
]
"""Tried before the positions that are interleaved in other ways."""
ATTACHED = Variant("detach of b is left out in a", frozenset({"detach"}), _unchanged)
"""Changes only gradients."""
