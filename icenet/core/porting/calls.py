"""The tree of module calls in a graph, and modules that become one layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from icenet.core.errors import PortError
from icenet.core.porting.layers import Layer, layer_of
from icenet.core.porting.record import Graph, Node, Place, Ref, Tensor, refs


@dataclass
class Call:
    """One call of a module."""

    path: str
    given: dict[str, Any]
    """Its arguments by name, with references."""
    place: Place | None = None
    results: Any = None
    items: list[Item] = field(default_factory=list)
    entered: str = ""

    def nodes(self) -> Iterator[Node]:
        for item in self.items:
            if isinstance(item, Node):
                yield item
            else:
                yield from item.nodes()

    def calls(self) -> Iterator[Call]:
        yield self
        for item in self.items:
            if isinstance(item, Call):
                yield from item.calls()


Item: TypeAlias = "Node | Call"


def tree(graph: Graph) -> Call:
    """Returns the call of the whole module."""
    root: Call | None = None
    stack: list[Call] = []
    before: list[Item] = []
    for node in graph.nodes:
        if node.op == "enter":
            call = Call(node.args["path"], node.args["values"], node.place, entered=node.name)
            if stack:
                stack[-1].items.append(call)
            else:
                root, call.items = call, before
            stack.append(call)
        elif node.op == "exit":
            if not stack or stack[-1].path != node.args["path"]:
                raise PortError(
                    f"{node.args['path'] or 'the module'}: its call does not end; does it raise an error?"
                )
            stack.pop().results = node.args["values"]
        else:
            (stack[-1].items if stack else root.items if root else before).append(node)
    if root is None:
        raise PortError("the module was not called during the export")
    return root


def collapse_layers(graph: Graph, allowed: set[str] | None = None) -> tuple[Graph, dict[str, Layer]]:
    """Replaces each call of a module that is one layer of mlx.nn by a node.

    Args:
        graph: A graph without operations in place.
        allowed: The paths of the modules that may become layers; None for all.

    Returns the graph, and the layers by path. A module whose arrays are shared with another one, or whose inner
    values are used outside, stays a call.
    """
    root = tree(graph)
    candidates: dict[str, Layer] = {}
    foreign = {path.rpartition(".")[0] for path in graph.shared}
    for path, module in graph.modules.items():
        layer = layer_of(module)
        if layer is not None and path and path not in foreign:
            if allowed is not None and path not in allowed:
                continue
            candidates[path] = layer
    uses = _outside_uses(graph, root)
    refused = {
        call.path
        for call in root.calls()
        if call.path in candidates and not _is_whole(graph, call, candidates[call.path], uses)
    }
    layers = {path: layer for path, layer in candidates.items() if path not in refused}
    called = {call.path for call in root.calls()}
    nodes: list[Node] = []

    def flatten(call: Call) -> None:
        layer = layers.get(call.path)
        if layer is not None:
            (given,), result = list(_tensors(call.given)), next(_tensors(call.results))
            if result != given:
                out = _out(graph, result)
                nodes.append(Node(result, "layer", {"path": call.path, "self": Ref(given)}, out, call.place))
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


def _tensors(value: Any) -> Iterator[str]:
    yield from refs(value)


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


def _is_whole(graph: Graph, call: Call, layer: Layer, uses: dict[str, list[str]]) -> bool:
    """Returns whether a call has one tensor as argument and result, and its other values are not used outside."""
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
        if any(call.entered not in used.split("/") for used in uses.get(node.name, ())):
            return False
    return True
