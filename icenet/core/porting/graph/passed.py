"""Modules that return their argument in one mode, such as a stochastic depth, which is one in training only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from icenet.core.porting.graph.calls import tree
from icenet.core.porting.record import Graph, Node, Ref, map_refs, refs, with_nodes


def with_passed_values(graphs: list[Graph]) -> list[Graph]:
    """Returns the graphs of both modes, in which what a module returns has another name than its argument.

    So the class of the module returns it, and the module is called in both modes. It is done for classes of which
    another call computes something, and not for layers of torch.nn.
    """
    computing: set[str] = set()
    for graph in graphs:
        for call in tree(graph).calls():
            given, results = [*refs(call.given)], [*refs(call.results)]
            if len(results) == 1 and results[0] not in given:
                computing.add(graph.modules[call.path].kind)
    computing = {kind for kind in computing if not kind.startswith("torch.nn.")}
    return [_renamed(graph, computing) for graph in graphs]


def _renamed(graph: Graph, computing: set[str]) -> Graph:
    tensors = graph.values()
    names: dict[str, str] = {}
    nodes: list[Node] = []
    entered: list[Node] = []

    def current(ref: Ref) -> Ref:
        return Ref(names.get(ref.name, ref.name))

    for node in graph.nodes:
        source = [*refs(node.args.get("values"))] if node.op == "exit" else []
        node = replace(node, args=map_refs(node.args, current))
        if node.op == "enter":
            entered.append(node)
        elif node.op == "exit":
            enter = entered.pop()
            results = [*refs(node.args["values"])]
            is_passed = len(results) == 1 and results[0] in refs(enter.args["values"]) and entered
            if is_passed and graph.modules[node.args["path"]].kind in computing:
                new = f"{source[0]}_passed{len(nodes)}"
                nodes.append(Node(new, "alias", {"self": Ref(results[0])}, tensors[source[0]]))
                names[source[0]] = new
                node = replace(node, args={**node.args, "values": _named(node.args["values"], new)})
        nodes.append(node)
    return with_nodes(graph, nodes, current)


def _named(values: Any, name: str) -> Any:
    """Returns results with another value in the place of the only one."""
    return map_refs(values, lambda _: Ref(name))
