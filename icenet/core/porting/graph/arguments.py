"""Arguments of a call that are one value, such as those of `attention(x, x, x)`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from icenet.core.porting.record import Graph, Ref


def with_arguments(graph: Graph) -> Graph:
    """Returns a graph in which a view that an export made for an argument is an operation of its own, `argument`.

    So the class of the module has a parameter for it, as in its other calls with several values.
    """
    sources = {node.name: node.args["self"] for node in graph.nodes if node.base == "alias"}
    views = {
        value.name
        for node in graph.nodes
        if node.op == "enter"
        for value in node.args["values"].values()
        if isinstance(value, Ref) and _is_among(sources.get(value.name), node.args["values"])
    }
    nodes = [replace(node, op="argument") if node.name in views else node for node in graph.nodes]
    return replace(graph, nodes=nodes)


def _is_among(source: Any, values: dict[str, Any]) -> bool:
    return source is not None and any(value == source for value in values.values())
