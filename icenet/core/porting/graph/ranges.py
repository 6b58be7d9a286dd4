"""Ranges of integers whose dtype is that of MLX, int32, where no result depends on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from icenet.core.porting.graph.functional import used_values
from icenet.core.porting.record import Dtype, Graph, Node, Tensor, refs, users_of

_VIEWS = ("unsqueeze", "expand", "view", "reshape", "select", "slice", "permute", "transpose", "alias", "squeeze")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_ARITHMETIC = ("add", "sub", "rsub", "mul", "div")
_SMALL = 2**20
"""What is added to a range below this number leaves it far within int32."""


def with_short_ranges(graph: Graph) -> Graph:
    """Returns a graph in which `torch.arange(n)` is int32 if it is only an index, compared, or made floating point.

    As in `self.position_embedding(mx.arange(T))`. A range that is a result, or of which another integer is computed,
    keeps its dtype.
    """
    used = used_values(graph)
    users = users_of(node for node in graph.nodes if node.op not in ("enter", "exit") and node.name in used)
    results = graph.results()

    def views(name: str) -> set[str] | None:
        """Returns a value and its views, None if the dtype of one of them matters."""
        found = {name}
        for node in users.get(name, ()):
            inner = views(node.name) if _is_view(node) else set() if _is_free(node, name) else None
            if inner is None:
                return None
            found |= inner
        return None if name in results else found

    short: set[str] = set()
    for node in graph.nodes:
        if node.base == "arange" and _dtype(node.out) == "int64":
            short |= views(node.name) or set()
    return replace(graph, nodes=[_shortened(node) if node.name in short else node for node in graph.nodes])


def _is_view(node: Node) -> bool:
    """Returns whether an operation returns the numbers of a range, or all of them moved by a small number."""
    other = node.args.get("other")
    is_moved = node.base in ("add", "sub") and type(other) is int and abs(other) < _SMALL
    return node.base in _VIEWS or (is_moved and _dtype(node.out) == "int64")


def _is_free(node: Node, name: str) -> bool:
    """Returns whether the result of an operation does not depend on the width of an integer that it reads."""
    if node.base in ("embedding", "index", "index_select"):
        return name not in refs(node.args.get("self", node.args.get("weight")))
    if node.base in _ARITHMETIC or node.base in ("to", "_to_copy", "float"):
        return str(_dtype(node.out)).startswith(("float", "bfloat"))
    return node.base in _COMPARISONS or node.base == "sym.sym_size"


def _dtype(out: Any) -> str | None:
    return out.dtype if isinstance(out, Tensor) else None


def _shortened(node: Node) -> Node:
    args = {**node.args, "dtype": Dtype("int32")} if node.args.get("dtype") is not None else node.args
    return replace(node, args=args, out=replace(node.out, dtype="int32"))
