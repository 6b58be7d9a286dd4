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
_SIZES = (2, 3, 6)
"""Sizes at which a mask is computed, and one beyond every number in its formula, such as the width of a window."""
_LARGEST = 5000
"""A mask whose formula has larger numbers stays. One of this size has 25 million values."""
_UNBOUNDED = 2**31
"""Numbers from here on mean `to the end` in a slice."""


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
        numbers = [abs(number) for node in nodes for number in _numbers((node.args, node.kwargs))]
        numbers += [abs(constant.item()) for node in nodes if (constant := _constant(node, program)) is not None]
        largest = max((int(number) for number in numbers if number < _UNBOUNDED), default=0)
        if largest > _LARGEST:
            return None
        kinds = {_kind_at(size, mask, nodes, program) for size in (*_SIZES, max(largest, *_SIZES) + 2)}
    except Exception:  # an operation of a user may raise anything at sizes that it was not written for
        return None
    return kinds.pop() if len(kinds) == 1 else None


def _ancestors(mask: Node, program: Any) -> list[Node]:
    """Returns the nodes of which a mask is made, in their order, up to sizes.

    Raises:
        _NotOfSizes: It depends on the values of an input or a weight, or on random numbers.
    """
    wanted, found = {mask}, []
    for node in reversed(program.graph.nodes):
        if node not in wanted:
            continue
        found.append(node)
        if _is_size(node) or _constant(node, program) is not None:
            continue
        tags = getattr(node.target, "tags", ())
        if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in tags:
            raise _NotOfSizes
        if node.target._schema.is_mutable:
            raise _NotOfSizes
        wanted.update(node.all_input_nodes)
    return found[::-1]


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


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
    found = values[mask]
    keeps = found if found.dtype == torch.bool else found == 0
    if found.dtype != torch.bool and not (keeps | (found <= torch.finfo(found.dtype).min)).all():
        return None
    if torch.equal(keeps, torch.ones(found.shape[-2:], dtype=torch.bool).tril().expand_as(keeps)):
        return "causal"
    return "full" if keeps.all() else None


def _value(value: Any, size: int, program: Any) -> Any:
    """Returns an expression of sizes where each size is another number from `size` on, within what it may be."""
    chosen = {}
    for index, (symbol, limits) in enumerate(
        sorted(program.range_constraints.items(), key=lambda item: str(item[0]))
    ):
        chosen[symbol] = int(min(max(size + index, limits.lower), limits.upper))
    expression = value.node.expr.subs(chosen)
    if isinstance(value, torch.SymBool):
        return bool(expression)
    return float(expression) if isinstance(value, torch.SymFloat) else int(expression)


def _numbers(value: Any) -> Iterable[float]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, dict):
        yield from _numbers(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
