"""Modules of the original that become one layer."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

from icenet.core.porting.graph.calls import Call, tree
from icenet.core.porting.graph.formulas import activation_of
from icenet.core.porting.graph.functional import used_values
from icenet.core.porting.graph.masks import hiding_masks
from icenet.core.porting.graph.norms import norm_of
from icenet.core.porting.layers import attention
from icenet.core.porting.layers.attention import Attention, attention_of
from icenet.core.porting.layers.embeddings import embedding_of
from icenet.core.porting.layers.mlx_layers import Layer, layer_of
from icenet.core.porting.layers.recurrent import Recurrent, call_of, joined, recurrent_of
from icenet.core.porting.record import Graph, Node, Ref, Tensor, refs


def collapse_layers(graph: Graph, allowed: dict[str, Layer] | None = None) -> tuple[Graph, dict[str, Layer]]:
    """Replaces each call of a module that is one layer of mlx.nn by a node.

    Args:
        graph: A graph without operations in place.
        allowed: The layers that modules may become, by path; None for all.

    Returns:
        The graph, and the layers by path. A module whose arrays are shared with another one, or whose inner values
        are used outside, stays a call.
    """
    root = tree(graph)
    candidates: dict[str, Layer] = {}
    paths = [array.path for array in graph.arrays.values()]
    foreign = {path.rpartition(".")[0] for path in graph.shared}
    foreign |= {path.removesuffix(".out_proj") for path in foreign}
    for path, module in graph.modules.items():
        layer = layer_of(module) or embedding_of(module) or recurrent_of(module) or attention_of(module, paths)
        if layer is not None and path and path not in foreign:
            if allowed is not None and path not in allowed:
                continue
            candidates[path] = layer
    candidates |= _formulas(graph, root, candidates.keys() | foreign, allowed)
    uses = _outside_uses(graph, root)
    whole: dict[str, list[Node]] = {}
    refused = _whole_recurrent(graph, root, candidates, uses, whole)
    refused |= _whole_attention(graph, root, candidates, uses, whole)
    entered: dict[str, set[str]] = {}
    for call in root.calls():
        entered.setdefault(call.path, set()).add(call.entered)
    refused |= {
        call.path
        for call in root.calls()
        if call.path in candidates
        and not isinstance(candidates[call.path], (Attention, Recurrent))
        and not _is_whole(graph, call, candidates[call.path], uses, entered[call.path])
    }
    refused |= _unread_norms(graph, root, candidates)
    layers = {path: layer for path, layer in candidates.items() if path not in refused}
    for path, layer in (allowed or {}).items():
        if isinstance(layer, Attention) and path in layers:
            layers[path] = layer  # as the calls of both modes need it
    called = {call.path for call in root.calls()}
    nodes: list[Node] = []

    def flatten(call: Call) -> None:
        layer = layers.get(call.path)
        if layer is not None:
            if isinstance(layer, Attention):
                nodes.extend(attention.nodes_of(whole[call.entered], call, layer, graph))
            elif isinstance(layer, Recurrent):
                nodes.extend(whole[call.entered])
            else:
                nodes.extend(_layer_nodes(graph, call))
            nodes.extend(_shared_sizes(call, uses))
            return
        nodes.append(Node(call.entered, "enter", {"path": call.path, "values": call.given}, None, call.place))
        for item in call.items:
            if isinstance(item, Node):
                nodes.append(item)
            else:
                flatten(item)
        nodes.append(Node(call.entered + "_exit", "exit", {"path": call.path, "values": call.results}, None))

    flatten(root)
    own = {path: layer for path, layer in layers.items() if path in called or not layer.is_stateless}
    updates = {path: value for path, value in graph.updates.items() if path.rpartition(".")[0] not in own}
    return replace(graph, nodes=nodes, updates=updates), own


def _unread_norms(graph: Graph, root: Call, candidates: dict[str, Layer]) -> set[str]:
    """Returns the batch norms whose result nothing reads: of these only the running statistics are computed."""
    changed = {path.rpartition(".")[0] for path in graph.updates}
    norms = changed & {path for path, layer in candidates.items() if layer.constructor == "nn.BatchNorm"}
    used = used_values(graph) if norms else set()
    return {call.path for call in root.calls() if call.path in norms and used.isdisjoint(refs(call.results))}


def _formulas(
    graph: Graph, root: Call, known: AbstractSet[str], allowed: dict[str, Layer] | None
) -> dict[str, Layer]:
    """Returns the layers of the modules that are an activation or a norm of mlx.nn in each of their calls."""
    owners = {array.path.rpartition(".")[0] for array in graph.arrays.values()}
    found: dict[str, list[Layer | None]] = {}
    for call in root.calls():
        path = call.path
        is_free = path not in known and not graph.modules[path].children
        if path and is_free and (allowed is None or path in allowed):
            layer = norm_of(graph, call) if path in owners else activation_of(call)
            found.setdefault(path, []).append(layer)
    return {
        path: layers[0]
        for path, layers in found.items()
        if layers[0] is not None and all(layer == layers[0] for layer in layers)
    }


def _whole_recurrent(
    graph: Graph, root: Call, candidates: dict[str, Layer], uses: dict[str, list[str]], whole: dict[str, list[Node]]
) -> set[str]:
    """Fills in the nodes of each call of a recurrent layer. Returns the modules that compute something else."""
    found: dict[str, list[Recurrent | None]] = {}
    for call in root.calls():
        layer = candidates.get(call.path)
        if isinstance(layer, Recurrent):
            made = call_of(graph, call, layer, uses)
            whole[call.entered] = made[1] if made else []
            found.setdefault(call.path, []).append(made[0] if made else None)
    refused = set()
    for path, layers in found.items():
        layer = joined([layer for layer in layers if layer is not None]) if None not in layers else None
        if layer is None:
            refused.add(path)
        else:
            candidates[path] = layer
    return refused


def _whole_attention(
    graph: Graph, root: Call, candidates: dict[str, Layer], uses: dict[str, list[str]], whole: dict[str, list[Node]]
) -> set[str]:
    """Fills in the node of each call of an attention. Returns the modules that compute something else."""
    found: dict[str, list[Attention | None]] = {}
    needed, hiding = set(), set()
    if any(isinstance(layer, Attention) for layer in candidates.values()):
        needed, hiding = used_values(graph), hiding_masks(graph)
    for call in root.calls():
        layer = candidates.get(call.path)
        if isinstance(layer, Attention):
            made = attention.call_of(graph, call, layer, uses, needed, hiding)
            whole[call.entered] = made[1] if made else []
            found.setdefault(call.path, []).append(made[0] if made else None)
    refused = set()
    for path, layers in found.items():
        known = [layer for layer in layers if layer is not None]
        layer = attention.joined(known) if len(known) == len(layers) else None
        if layer is None:
            refused.add(path)
        else:
            candidates[path] = layer
    return refused


def _layer_nodes(graph: Graph, call: Call) -> list[Node]:
    """Returns the node of a call that is one layer; none if the layer returns its argument."""
    (given,), result = list(refs(call.given)), next(refs(call.results))
    if result == given:
        return []
    return [Node(result, "layer", {"path": call.path, "self": Ref(given)}, _out(graph, result), call.place)]


def _out(graph: Graph, name: str) -> Any:
    if name in graph.tensors:
        return graph.tensors[name]
    return next(node.out for node in graph.nodes if node.name == name)


def _outside_uses(graph: Graph, root: Call) -> dict[str, list[str]]:
    """Returns the entered calls in which each value is used."""
    uses: dict[str, list[str]] = {}

    def walk(call: Call, stack: tuple[str, ...]) -> None:
        stack = (*stack, call.entered)
        for item in call.items:
            if isinstance(item, Node):
                for name in refs(item.args):
                    uses.setdefault(name, []).append("/".join(stack))
            else:
                walk(item, stack)
                for name in (*refs(item.given), *refs(item.results)):
                    uses.setdefault(name, []).append("/".join(stack))

    walk(root, ())
    for name in (*refs(root.results), *refs(graph.output_tree)):
        uses.setdefault(name, []).append("")
    return uses


def _shared_sizes(call: Call, uses: dict[str, list[str]]) -> list[Node]:
    """Returns the arithmetic of sizes in a call whose results are used outside: an export computes a size once."""
    found: list[Node] = []
    needed: set[str] = set()
    for node in reversed(list(call.nodes())):
        used = any(call.entered not in stack.split("/") for stack in uses.get(node.name, ()))
        if node.op.startswith("sym.") and (used or node.name in needed):
            found.append(node)
            needed.update(refs(node.args))
    return found[::-1]


def _is_whole(graph: Graph, call: Call, layer: Layer, uses: dict[str, list[str]], same: set[str]) -> bool:
    """Returns whether a call has one tensor as argument and result, and its other values are not used outside.

    The next call of the module, one of `same`, uses the running statistics of this one, as it does in MLX.
    """
    given, results = list(refs(call.given)), list(refs(call.results))
    if len(given) != 1 or len(results) != 1:
        return False
    source = _out(graph, given[0])
    if not isinstance(source, Tensor):
        return False
    is_flat_norm = layer.constructor == "nn.BatchNorm" and source.ndim == 2
    if layer.axes == "last" and layer.rank > 0 and source.ndim != layer.rank + 2 and not is_flat_norm:
        return False
    if layer.constructor == "nn.GroupNorm" and source.ndim < 3:
        return False
    for node in call.nodes():
        if node.name == results[0] or node.base.startswith("sym."):
            continue
        if any(same.isdisjoint(used.split("/")) for used in uses.get(node.name, ())):
            return False
    return True
