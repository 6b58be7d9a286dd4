"""The dtype of the new arrays in a port whose weights are in half precision."""

from __future__ import annotations

import re
from dataclasses import replace

from icenet.core.porting.record import Graph, Node, Tensor

MADE_IN = "made_in"
"""The argument of an operation that has the dtype of its array."""
_FLOAT32 = re.compile(r"\bfloat(32)?\b")


def with_new_arrays_in(graph: Graph, dtype: str) -> Graph:
    """Returns a graph whose new arrays have a dtype where the original takes that of an input or of a weight.

    `x.new_zeros(4)` and `torch.zeros(4, dtype=x.dtype)` do; `torch.zeros(4)` and `dtype=torch.float32` do not.

    Args:
        graph: The graph of a module in float32.
        dtype: A dtype of MLX, such as "bfloat16".
    """
    nodes = [replace(node, args={**node.args, MADE_IN: dtype}) if _follows(node) else node for node in graph.nodes]
    return replace(graph, nodes=nodes)


def _follows(node: Node) -> bool:
    if not isinstance(node.out, Tensor) or node.out.dtype != "float32":
        return False
    is_named = node.args.get("dtype") is not None
    if node.base in ("new_zeros", "new_ones", "new_full", "new_empty") and not is_named:
        return True
    is_new = node.base in ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
    return is_new and is_named and node.place is not None and not _FLOAT32.search(node.place.code)
