"""Single operations: left out, reversed, of another kind, or in TF32."""

from __future__ import annotations

from typing import Any

import torch

from icenet_torch.tools.variants.variant import Run, Variant, arguments


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


def _repeated(func: Any, args: Any, kwargs: Any) -> Any:
    given = arguments(("input", "repeats", "dim"), args, kwargs)
    if not isinstance(given.get("repeats"), int) or given.get("dim") is None:
        return NotImplemented
    return torch.cat([given["input"]] * given["repeats"], dim=given["dim"])


def _flipped(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].clone()


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
    return tensors[0].expand(shape).clone() if tensors[0].shape == shape else NotImplemented


def _left_out_first(func: Any, args: Any, kwargs: Any) -> Any:
    return _left_out(func, args[1::-1], kwargs)


_CONVS = frozenset({"conv1d", "conv2d", "conv3d"})
_PRODUCTS = _CONVS | {"linear", "matmul", "bmm", "einsum", "scaled_dot_product_attention"}

VARIANTS: list[Variant] = [
    Variant("no bias in a", _CONVS | {"linear"}, _bias(0.0)),
    Variant("the bias is added twice in a", _CONVS | {"linear"}, _bias(2.0)),
    Variant(
        "the parts are concatenated in the reverse order in a",
        frozenset({"cat", "concat", "concatenate", "stack"}),
        _reversed_list,
    ),
    Variant(
        "the parts of a split are in the reverse order in a", frozenset({"chunk", "split", "unbind"}), _reversed_parts
    ),
    Variant(
        "heads repeated in turn (tile) in a, each several times (repeat_interleave) in b",
        frozenset({"repeat_interleave"}),
        _repeated,
    ),
    Variant("the sequence is not reversed in a", frozenset({"flip"}), _flipped),
    Variant("sum in a, mean in b", frozenset({"mean"}), _summed("sum")),
    Variant("maximum in a, mean in b", frozenset({"mean"}), _summed("amax")),
    Variant("mean in a, sum in b", frozenset({"sum"}), _summed("mean")),
    Variant("a quotient is left out in a", frozenset({"div", "truediv"}), _left_out),
    *(
        Variant(f"a {what} is left out in a", frozenset({name, f"i{name}"}), run)
        for name, what in (("mul", "product"), ("add", "sum"))
        for run in (_left_out, _left_out_first)
    ),
    Variant("products in TF32 in a, whose precision is 10 bits: set MLX_ENABLE_TF32=0", _PRODUCTS, _in_tf32),
]
