"""Fused attentions as a person would call them: without a mask that is causal, and without repeated keys and values.

Models of transformers compute a causal mask from positions, and repeat the heads of keys for those of the queries.
MLX's attention needs neither. With `mask="causal"` it computes no scores of hidden keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_RESHAPES = (torch.ops.aten.reshape.default, torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_COPIES = (torch.ops.aten.clone.default, torch.ops.aten.contiguous.default, torch.ops.aten.alias.default)
_LINEAR = frozenset(
    [
        *("arange", "ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "ones_like", "zeros_like"),
        *("full_like", "scalar_tensor", "view", "reshape", "unsqueeze", "squeeze", "expand", "expand_as", "permute"),
        *("transpose", "t", "slice", "index", "clone", "alias", "contiguous", "detach", "lift_fresh_copy", "to"),
        *("_to_copy", "type_as", "add", "sub", "rsub", "neg", "abs", "diff", "clamp", "clamp_min", "clamp_max"),
        *("minimum", "maximum", "mul", "div", "floor_divide", "eq", "ne", "lt", "le", "gt", "ge", "where"),
        *("masked_fill", "tril", "triu"),
    ]
)
"""Operations on positions whose results change at places that are sums and products of the numbers in a formula."""
_LOGICAL = frozenset(
    [
        *("cumsum", "logical_and", "logical_or", "logical_not", "logical_xor"),
        *("bitwise_and", "bitwise_or", "bitwise_not", "__and__", "__or__"),
    ]
)
"""Operations that are so on booleans."""
_FACTORS = frozenset(["mul", "div", "floor_divide"])
_SIZES = (2, 3, 6)
"""Sizes at which a mask is computed, and one beyond every place where its formula may change, such as a window."""
_LARGEST = 5000
"""A mask whose formula may change at larger sizes stays. One of this size has 25 million values."""
_UNBOUNDED = 2**31
"""Numbers from here on mean `to the end` in a slice, and hide a key in a mask."""
_EXACT = (torch.bool, torch.int32, torch.int64, torch.float32, torch.float64)
"""Types in which positions are exact. Those in bf16 are equal from 256 on."""


class _NotOfSizes(Exception):
    """A value depends on more than sizes."""


def simplify_attentions(program: Any) -> None:
    """Changes the fused attentions in the graph of an exported program.

    A mask that depends on sizes alone becomes `is_causal`, or none if it hides nothing. Keys and values whose heads
    are repeated one by one become those that are repeated, with `enable_gqa`.
    """
    kinds: dict[Node, str | None] = {}
    for node in program.graph.nodes:
        if node.target is not _ATTENTION:
            continue
        given: list[Any] = [*node.args, *(None, 0.0, False)[len(node.args) - 3 :]]
        query, key, value, mask, dropout, is_causal = given
        if isinstance(mask, Node) and not is_causal:
            if mask not in kinds:
                kinds[mask] = _kind(mask, program)
            if kinds[mask] is not None:
                mask, is_causal = None, kinds[mask] == "causal"
        keys, values = _repeated(key), _repeated(value)
        if keys is not None and values is not None and keys[1] == values[1] and not node.kwargs.get("enable_gqa"):
            key, value = keys[0], values[0]
            node.kwargs = {**node.kwargs, "enable_gqa": True}
        node.args = (query, key, value, mask, dropout, is_causal)


def _repeated(node: Node) -> tuple[Node, int] | None:
    """Returns the heads `[B, H, T, D]` that a node repeats one by one, and how often; None if it does not."""
    whole = node.meta["val"].shape
    if node.target is torch.ops.aten.repeat_interleave.self_int and len(node.args) == 3 and node.args[2] in (1, -3):
        source, times = node.args[:2]
        return (source, times) if len(whole) == 4 and isinstance(times, int) else None
    if node.target not in _RESHAPES or len(whole) != 4:
        return None
    expanded = _passed(node.args[0])
    if expanded.target is not torch.ops.aten.expand.default:
        return None
    wide = _passed(expanded.args[0])
    if wide.target is not torch.ops.aten.unsqueeze.default or wide.args[1] not in (2, -3):
        return None
    source, shape = _passed(wide.args[0]), expanded.meta["val"].shape
    heads, times = source.meta["val"].shape[1], shape[2]
    is_repetition = (
        len(shape) == 5 and isinstance(heads, int) and isinstance(times, int) and whole[1] == heads * times
    )
    same = [str(whole[axis]) == str(source.meta["val"].shape[axis]) for axis in (0, 2, 3)]
    return (source, times) if is_repetition and all(same) else None


def _passed(node: Any) -> Node:
    """Returns the node of which a node is a copy, or a slice that has all."""
    while node.target in _COPIES or (
        node.target is torch.ops.aten.slice.Tensor
        and str(node.meta["val"].shape) == str(node.args[0].meta["val"].shape)
    ):
        node = node.args[0]
    found: Node = node
    return found


def _kind(mask: Node, program: Any) -> str | None:
    """Returns whether a mask is "causal" or "full" at every size; None if it is another one, or may be."""
    shape = mask.meta["val"].shape
    if len(shape) < 2 or str(shape[-1]) != str(shape[-2]):
        return None
    try:
        nodes = _ancestors(mask, program)
        last = _last_change(nodes, program)
        if last > _LARGEST:
            return None
        kinds = {_kind_at(size, mask, nodes, program) for size in (*_SIZES, max(last, *_SIZES) + 2)}
    except Exception:  # an operation of a user may raise anything at sizes that it was not written for
        return None
    return kinds.pop() if len(kinds) == 1 else None


def _ancestors(mask: Node, program: Any) -> list[Node]:
    """Returns the nodes of which a mask is made, in their order, up to sizes.

    Raises:
        _NotOfSizes: It depends on the values of an input or a weight, on random numbers, or on an operation of which
            it is not known where its results change, such as a logarithm.
    """
    wanted, found = {mask}, []
    for node in reversed(program.graph.nodes):
        if node not in wanted:
            continue
        found.append(node)
        if _is_size(node) or _constant(node, program) is not None:
            continue
        if not _is_linear(node):
            raise _NotOfSizes
        wanted.update(node.all_input_nodes)
    return found[::-1]


def _is_linear(node: Node) -> bool:
    """Returns whether the results of a node change only at sums and products of its numbers."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    name = node.target._schema.name.removeprefix("aten::")
    if name in _FACTORS and not isinstance(node.args[1], (int, float)):
        return False
    return name in _LINEAR or (name in _LOGICAL and all(_is_boolean(given) for given in node.all_input_nodes))


def _is_boolean(node: Node) -> bool:
    return getattr(node.meta.get("val"), "dtype", None) == torch.bool


def _last_change(nodes: list[Node], program: Any) -> int:
    """Returns the size beyond which linear operations have no other results.

    Raises:
        _NotOfSizes: A number is a fraction: the place where `0.99 * i` falls behind `i - 1` is not among the numbers.
    """
    summands, factor = 1, 1
    for node in nodes:
        constant = _constant(node, program)
        if _is_size(node):
            for number in node.meta["val"].node.expr.atoms():
                if number.is_number:
                    factor *= (1 + abs(int(number.p))) * int(number.q)
        elif constant is not None:
            summands += _whole(constant.item())
        elif node.target._schema.name.removeprefix("aten::") in _FACTORS:  # type: ignore[union-attr]
            factor *= max(1, _whole(node.args[1]))
        else:
            summands += sum(map(_whole, _numbers(node)))
    return summands * factor


def _whole(number: Any) -> int:
    if abs(number) >= _UNBOUNDED:
        return 0
    if number != int(number):
        raise _NotOfSizes
    return abs(int(number))


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _constant(node: Node, program: Any) -> torch.Tensor | None:
    """Returns the tensor of a placeholder for a number, such as `torch.tensor(True)`."""
    if node.op != "placeholder":
        return None
    specs = program.graph_signature.input_specs
    target = next((spec.target for spec in specs if getattr(spec.arg, "name", None) == node.name), None)
    found = program.constants.get(target)
    return found if isinstance(found, torch.Tensor) and found.numel() == 1 else None


def _kind_at(size: int, mask: Node, nodes: list[Node], program: Any) -> str | None:
    """Returns the kind of a mask at one size; None if it is another one."""
    values: dict[Node, Any] = {}
    for node in nodes:
        if _is_size(node):
            values[node] = _value(node.meta["val"], size, program)
        elif node.op == "placeholder":
            values[node] = _constant(node, program)
        else:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            if values[node].dtype not in _EXACT and not (_is_bit(values[node]) | _is_hidden(values[node])).all():
                return None
    found = values[mask]
    keeps = found if found.dtype == torch.bool else found == 0
    if found.dtype != torch.bool and not (keeps | _is_hidden(found)).all():
        return None
    if torch.equal(keeps, torch.ones(found.shape[-2:], dtype=torch.bool).tril().expand_as(keeps)):
        return "causal"
    return "full" if keeps.all() else None


def _is_bit(values: torch.Tensor) -> torch.Tensor:
    return (values == 0) | (values == 1)


def _is_hidden(values: torch.Tensor) -> torch.Tensor:
    return values <= torch.finfo(values.dtype).min


def _value(value: torch.SymInt, size: int, program: Any) -> int:
    """Returns an expression of sizes where each size is another number from `size` on, within what it may be."""
    chosen = {}
    for index, (symbol, limits) in enumerate(
        sorted(program.range_constraints.items(), key=lambda item: str(item[0]))
    ):
        chosen[symbol] = int(min(max(size + index, limits.lower), limits.upper))
    return int(value.node.expr.subs(chosen))


def _numbers(node: Node) -> Iterable[float]:
    """Yields the numbers that a node is given, without axes and other options."""
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        is_option = isinstance(given, bool) or isinstance(argument.real_type, torch.IntType)
        if isinstance(given, (int, float)) and not is_option:
            yield given
