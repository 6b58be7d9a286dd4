"""Values that are written into a part of an array: one index for the part of a part, as in `x[:, :3][..., 0] = y`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from icenet.core.porting.record import Graph, Node, Ref, Tensor, map_refs, refs, with_nodes


def joined_writes(graph: Graph) -> Graph:
    """Returns a graph in which values that are written into a part of a part of an array are written at one index.

    What an array has already is not written again.
    """
    tensors = graph.values()
    by_name = {node.name: node for node in graph.nodes}
    uses = Counter(name for node in graph.nodes for name in refs(node.args))
    uses.update(refs([graph.output_tree, graph.updates]))
    nodes = []
    same: dict[str, Ref] = {}
    for node in graph.nodes:
        made = node
        inner = by_name.get(node.args["src"].name) if _is_write(node) else None
        while inner is not None and _is_write(inner) and uses[inner.name] == 1:
            part = by_name.get(inner.args["self"].name)
            outer = index_of(made, tensors)
            own = index_of(inner, tensors)
            if part is None or outer is None or own is None or not _is_part(part, made, outer, tensors):
                break
            joined = _joined(outer, own)
            if joined is None:
                break
            args = {"self": made.args["self"], "src": inner.args["src"], "view": "index", "args": {"index": joined}}
            made = replace(made, args=args)
            inner = by_name.get(made.args["src"].name) if isinstance(made.args["src"], Ref) else None
        written = _source(made.args["self"].name, by_name) if _is_write(made) else ""
        if written and _writes_again(made, by_name.get(written), by_name, tensors):
            same[node.name] = Ref(same[written].name if written in same else written)
        else:
            nodes.append(made)

    def current(ref: Ref) -> Ref:
        return same.get(ref.name, ref)

    nodes = [replace(node, args=map_refs(node.args, current)) for node in nodes]
    return with_nodes(graph, nodes, current)


def _source(name: str, by_name: dict[str, Node]) -> str:
    """Returns the value of which another one is a copy, or the whole."""
    while (node := by_name.get(name)) is not None:
        args = node.args
        is_whole = (
            node.base == "slice" and (args.get("start"), args.get("step", 1)) == (0, 1) and _is_open(args["end"])
        )
        source = args.get("src") if node.base == "copy" else args.get("self")
        if not (is_whole or node.base in ("copy", "alias")) or not isinstance(source, Ref):
            break
        given = by_name.get(source.name)
        if node.base == "copy" and (given is None or not _is_alike(given.out, node.out)):
            break
        name = source.name
    return name


def _is_alike(one: Any, other: Any) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)


def _is_open(end: Any) -> bool:
    return end is None or (isinstance(end, int) and end > 2**40)


def _writes_again(node: Node, before: Node | None, by_name: dict[str, Node], tensors: dict[str, Any]) -> bool:
    """Returns whether a part has these values already: Python's `x[:, 0] += y` adds in place, and then assigns."""
    if before is None or not _is_write(before):
        return False
    index = index_of(node, tensors)
    sources = {_source(item.args["src"].name, by_name) for item in (node, before)}
    return index is not None and index == index_of(before, tensors) and len(sources) == 1


def _is_write(node: Node) -> bool:
    return node.op == "scatter_view" and isinstance(node.args["src"], Ref) and isinstance(node.args["self"], Ref)


def index_of(node: Node, tensors: dict[str, Any]) -> list[Any] | None:
    """Returns the index of each axis at which a node writes values: a slice or a position; None for other views."""
    op, args = node.args["view"].partition(".")[0], node.args["args"]
    if op == "index":
        return list(args["index"])
    tensor = tensors.get(node.args["self"].name)
    if not isinstance(tensor, Tensor) or op not in ("select", "slice", "narrow"):
        return None
    index: list[Any] = [slice(None)] * tensor.ndim
    dim = args["dim"] % tensor.ndim
    if op == "select":
        index[dim] = args["index"]
    elif op == "slice":
        start, end, step = args.get("start"), args.get("end"), args.get("step", 1)
        end = None if _is_open(end) else end
        index[dim] = slice(None if start == 0 else start, end, None if step == 1 else step)
    elif type(args["start"]) is int and type(args["length"]) is int and args["start"] >= 0:
        index[dim] = slice(args["start"], args["start"] + args["length"])
    else:
        return None
    return index


def _is_part(part: Node, node: Node, index: list[Any], tensors: dict[str, Any]) -> bool:
    """Returns whether a node reads the part of an array into which another one writes."""
    view = Node(part.name, "scatter_view", {**node.args, "view": part.op, "args": part.args}, part.out)
    is_view = part.base in ("select", "slice", "narrow") and part.args.get("self") == node.args["self"]
    return is_view and index_of(view, tensors) == index


def _joined(outer: list[Any], inner: list[Any]) -> list[Any] | None:
    """Returns the index of a part of a part; None if both take a part of an axis."""
    own = iter(inner)
    found = []
    for item in outer:
        if not isinstance(item, slice):
            found.append(item)
            continue
        other = next(own)
        if item == slice(None):
            found.append(other)
        elif other == slice(None):
            found.append(item)
        else:
            return None
    return found
