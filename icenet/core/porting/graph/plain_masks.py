"""Masks of attention as a person writes them: transformers computes each element of a mask at its indices.

`mask[arange(B)[:, None, None, None], arange(T)]` is `mask[:, None, None]`, and `arange(T) >= 0` is true everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from icenet.core.porting.graph.functional import is_whole, used_values
from icenet.core.porting.record import Dtype, Graph, Node, Ref, Tensor, map_refs, refs, users_of, with_nodes

_ANDS = ("__and__", "bitwise_and", "logical_and")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_NAMES_ONLY = ("enter", "exit")


@dataclass(frozen=True)
class _Range:
    """The integers from 0 along one axis of a value, whose other axes have one element."""

    name: str
    """The name of the range itself."""
    axis: int
    ndim: int
    stop: Any
    """Where it ends: a number, or the reference of a size."""


def with_plain_masks(graph: Graph) -> Graph:
    """Returns a graph whose masks are read without indices of whole ranges and without parts that are always true."""
    tensors = graph.values()
    used = used_values(graph)
    users = users_of(node for node in graph.nodes if node.op not in _NAMES_ONLY and node.name in used)
    results = graph.results()
    ranges: dict[str, _Range] = {}
    true: set[str] = set()
    same: dict[str, Ref] = {}

    def given(ref: Ref) -> Ref:
        return same.get(ref.name, ref)

    def serves(node: Node, name: str) -> bool:
        """Returns whether a value of a smaller shape serves all that read the result of an operation."""
        other, out = tensors[name], node.out
        if other.shape == out.shape:
            return True
        if node.name in results or other.ndim != out.ndim:
            return False
        open_axes = [axis for axis, sizes in enumerate(zip(other.shape, out.shape, strict=True)) if len({*sizes}) > 1]
        return all(
            user.args.get("attn_mask") == Ref(node.name)  # which has the axes of the scores
            or (user.base == "expand" and all(user.args["size"][axis] != -1 for axis in open_axes))
            or _is_broadcast(user, node.name, other.shape, tensors)
            for user in users.get(node.name, ())
        )

    nodes: list[Node] = []
    for node in graph.nodes:
        node = replace(node, args=map_refs(node.args, given))
        found = _range(node, ranges)
        if found is not None:
            ranges[node.name] = found
        if _is_true(node, ranges):
            true.add(node.name)
        if node.base in _ANDS:
            pair = [node.args.get("self"), node.args.get("other")]
            rest = [ref for ref in pair if isinstance(ref, Ref) and ref.name not in true]
            if not rest and all(isinstance(ref, Ref) for ref in pair):
                true.add(node.name)
            elif (
                len(rest) == 1
                and all(isinstance(ref, Ref) for ref in pair)
                and _is_bool(tensors.get(rest[0].name))
                and serves(node, rest[0].name)
            ):
                same[node.name] = rest[0]
                continue
        nodes += _read_plainly(node, ranges, tensors) or [node]
    return _with_low_comparisons(with_nodes(graph, nodes, given), ranges)


def _with_low_comparisons(graph: Graph, ranges: dict[str, _Range]) -> Graph:
    """Returns a graph in which ranges are compared without first axes of one element that the other side of & has.

    `arange(T)[None, None, None] <= arange(T)[None, None, :, None]` is `arange(T) <= arange(T)[:, None]` there.
    """
    tensors = graph.values()
    users = users_of(graph.nodes)
    results = graph.results()
    nodes: list[Node] = []
    for node in graph.nodes:
        pair = [node.args.get("self"), node.args.get("other")]
        found = [ranges[ref.name] for ref in pair if isinstance(ref, Ref) and ref.name in ranges]
        first = min((item.axis for item in found), default=0)
        is_low = len(found) == 2 and node.base in _COMPARISONS and node.name not in results and first > 0
        readers = users.get(node.name, [])
        if not is_low or not all(_gives_axes(user, node, first, tensors) for user in readers):
            nodes.append(node)
            continue
        sides = []
        for number, item in enumerate(found):
            side, shape = Ref(item.name), tensors[item.name].shape
            for axis in range(item.ndim - item.axis - 1):
                name, shape = f"{node.name}_side_{number}_{axis}", (*shape, 1)
                out = Tensor(shape, tensors[item.name].dtype)
                nodes.append(Node(name, "unsqueeze", {"self": side, "dim": len(shape) - 1}, out, node.place))
                side = Ref(name)
            sides.append(side)
        out = Tensor(node.out.shape[first:], node.out.dtype)
        nodes.append(replace(node, args={**node.args, "self": sides[0], "other": sides[1]}, out=out))
    return replace(graph, nodes=nodes)


def _gives_axes(user: Node, node: Node, count: int, tensors: dict[str, Any]) -> bool:
    """Returns whether the result of an operation has all axes if a value lacks a number of its first ones."""
    if user.base == "expand":
        return -1 not in user.args["size"][:count]
    others = [name for name in refs([user.args.get("self"), user.args.get("other")]) if name != node.name]
    return user.base in _ANDS and len(others) == 1 and tensors[others[0]].ndim >= node.out.ndim


def _is_broadcast(user: Node, name: str, shape: tuple[Any, ...], tensors: dict[str, Any]) -> bool:
    """Returns whether an operation has the same shape if a value has another one."""
    if user.base not in (*_ANDS, "where", "masked_fill") or not isinstance(user.out, Tensor):
        return False
    shapes = [shape if ref == name else tensors[ref].shape for ref in refs(user.args)]
    rows = [(1,) * (user.out.ndim - len(item)) + tuple(item) for item in shapes]
    sizes = [{*column} - {1} or {1} for column in zip(*rows, strict=True)]
    return all(len(found) == 1 for found in sizes) and tuple(found.pop() for found in sizes) == user.out.shape


def _is_bool(out: Any) -> bool:
    return isinstance(out, Tensor) and out.dtype == "bool"


def _range(node: Node, ranges: dict[str, _Range]) -> _Range | None:
    """Returns the range that a value is, None for another one."""
    if node.base == "arange" and isinstance(node.out, Tensor) and not node.out.is_floating:
        is_plain = node.args.get("start") in (None, 0) and node.args.get("step") in (None, 1)
        return _Range(node.name, 0, 1, node.args["end"]) if is_plain else None
    source = node.args.get("self")
    before = ranges.get(source.name) if isinstance(source, Ref) else None
    if before is None:
        return None
    if node.base == "unsqueeze":
        dim = node.args["dim"] % (before.ndim + 1)
        return _Range(before.name, before.axis + (dim <= before.axis), before.ndim + 1, before.stop)
    return before if is_whole(node, {}) else None


def _is_true(node: Node, ranges: dict[str, _Range]) -> bool:
    """Returns whether a value is true in all its elements."""
    if not _is_bool(node.out):
        return False
    if node.base in ("new_ones", "ones"):
        return node.args.get("dtype") == Dtype("bool")
    source = node.args.get("self")
    return node.op == "ge.Scalar" and node.args["other"] == 0 and isinstance(source, Ref) and source.name in ranges


def _read_plainly(node: Node, ranges: dict[str, _Range], tensors: dict[str, Any]) -> list[Node]:
    """Returns the nodes of a part with new axes for reading at ranges, none if an operation does something else."""
    source = node.args.get("self")
    if node.base != "index" or not isinstance(source, Ref) or not isinstance(node.out, Tensor):
        return []
    given, indices = tensors.get(source.name), node.args["indices"]
    found = [ranges[ref.name] for ref in indices if isinstance(ref, Ref) and ref.name in ranges]
    if not isinstance(given, Tensor) or not len(found) == len(indices) == given.ndim:
        return []
    places = [item.axis + node.out.ndim - item.ndim for item in found]
    axes = [axis for axis in range(node.out.ndim) if axis not in places]
    if places != sorted({*places}) or len(axes) + len(places) != node.out.ndim:
        return []
    nodes: list[Node] = []
    shape = list(given.shape)

    def add(op: str, **args: Any) -> None:
        nonlocal source
        name = f"{node.name}_plain_{len(nodes)}"
        nodes.append(Node(name, op, {"self": source, **args}, Tensor(tuple(shape), node.out.dtype), node.place))
        source = Ref(name)

    for dim, (ref, item) in enumerate(zip(indices, found, strict=True)):
        size = tensors[ref.name].shape[item.axis]
        if size != shape[dim] or not isinstance(size, int):  # the original takes longer axes than in the example
            shape[dim] = size
            add("slice.Tensor", dim=dim, start=0, end=item.stop, step=1)
    for axis in axes:
        shape.insert(axis, 1)
        add("unsqueeze", dim=axis)
    return [*nodes[:-1], replace(nodes[-1], name=node.name)] if nodes else []
