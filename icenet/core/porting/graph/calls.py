"""The tree of module calls in a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from icenet.core.errors import PortError
from icenet.core.porting.record import Graph, Node, Place


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
