"""Indices that are computed from values with a gradient, as in `embedding((x * 255).long())`.

PyTorch has no gradient of integers and booleans. MLX refuses that of an index, which it would compute.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from icenet.core.porting.record import Graph, Node, Ref, Tensor, map_refs, refs, with_nodes

_INDICES = {
    **dict.fromkeys(("index", "index_put", "_index_put_impl", "embedding", "take_along_dim"), ("indices",)),
    **dict.fromkeys(("gather", "scatter", "scatter_add", "scatter_reduce", "take", "put"), ("index",)),
    **dict.fromkeys(("index_add", "index_copy", "index_fill", "index_reduce", "index_select"), ("index",)),
    **dict.fromkeys(("masked_select", "masked_scatter"), ("mask",)),
    **dict.fromkeys(("nonzero", "nonzero_static", "nonzero_numpy", "argwhere", "bincount"), ("self",)),
    **dict.fromkeys(("nll_loss", "nll_loss_nd", "nll_loss2d", "cross_entropy_loss"), ("target",)),
    **dict.fromkeys(("multi_margin_loss", "multilabel_margin_loss"), ("target",)),
    "embedding_bag": ("indices", "offsets"),
    "where.default": ("condition",),
    "repeat_interleave": ("repeats",),
}
"""The arguments of operations that are places in an array."""
_WITHOUT_GRADIENT = ("detach", "item", "argmax", "argmin", "argsort", "zeros_like", "ones_like", "full_like")
"""Operations whose integers have no gradient in MLX: places of the largest, an order, and what reads shapes only."""


def detached_indices(graph: Graph) -> Graph:
    """Returns a graph in which integers and booleans that are indices have no gradient."""
    tensors = graph.values()
    places = _places(graph, tensors)
    follows = {name for name, array in graph.arrays.items() if array.kind == "parameter"}
    follows |= {ref.name for ref in graph.inputs}
    follows = {name for name in follows if _has_gradient(tensors[name])}
    nodes: list[Node] = []
    same: dict[str, Ref] = {}

    def current(ref: Ref) -> Ref:
        return same.get(ref.name, ref)

    for node in graph.nodes:
        node = replace(node, args=map_refs(node.args, current))
        nodes.append(node)
        if node.op in ("enter", "exit") or node.base == "detach" or follows.isdisjoint(refs(node.args)):
            continue
        if isinstance(node.out, (list, tuple)) or _has_gradient(node.out):
            follows.add(node.name)
        elif isinstance(node.out, Tensor) and node.name in places and not _is_free(node):
            name = f"{node.name}_detached"
            nodes.append(Node(name, "detach", {"self": Ref(node.name)}, node.out, node.place))
            same[node.name] = Ref(name)
    return with_nodes(graph, nodes, current)


def _places(graph: Graph, tensors: dict[str, Any]) -> set[str]:
    """Returns the integers and booleans from which indices are computed."""
    found: set[str] = set()
    for node in reversed(graph.nodes):
        given: Any = [node.args.get(name) for name in _INDICES.get(node.op, _INDICES.get(node.base, ()))]
        if node.base == "index_put" and _is_choice(node, tensors):
            given = []
        if node.name in found and node.op not in ("enter", "exit"):
            given = node.args
        found.update(name for name in refs(given) if not _has_gradient(tensors.get(name)))
    return found


def _is_choice(node: Node, tensors: dict[str, Any]) -> bool:
    """Returns whether one number is written at a mask, which is a choice and no index: `x[x > 1] = 0`."""
    mask, values = (list(refs(node.args[name])) for name in ("indices", "values"))
    alone = len(node.args["indices"]) == 1 and tensors[mask[0]].dtype == "bool"
    return alone and bool(values) and tensors[values[0]].shape in ((), (1,))


def _is_free(node: Node) -> bool:
    return node.base in _WITHOUT_GRADIENT or node.base.startswith(("new_", "sym."))


def _has_gradient(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and (tensor.is_floating or tensor.is_complex)
