"""Masks of an attention that are added to the scores: those that may hide all keys of a query."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from icenet.core.porting.record import Graph, Ref, Tensor, refs

_KEEPS = frozenset(
    [
        "_unsafe_view",
        "add",
        "adjoint",
        "alias",
        "atleast_1d",
        "atleast_2d",
        "atleast_3d",
        "cat",
        "chunk",
        "clone",
        "constant_pad_nd",
        "contiguous",
        "detach",
        "diagonal",
        "div",
        "dsplit",
        "expand",
        "expand_as",
        "flatten",
        "flip",
        "gather",
        "hsplit",
        "imag",
        "index",
        "index_put",
        "index_select",
        "item",
        "mH",
        "mT",
        "masked_fill",
        "maximum",
        "minimum",
        "moveaxis",
        "movedim",
        "mul",
        "narrow",
        "numpy_T",
        "pad",
        "permute",
        "real",
        "repeat",
        "repeat_interleave",
        "reshape",
        "reshape_as",
        "roll",
        "scatter_view",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "squeeze_multiple",
        "stack",
        "sub",
        "swapaxes",
        "swapdims",
        "t",
        "tensor_split",
        "to",
        "transpose",
        "tril",
        "triu",
        "type_as",
        "unbind",
        "unflatten",
        "unfold",
        "unsqueeze",
        "view",
        "view_as",
        "view_as_complex",
        "view_as_real",
        "vsplit",
        "where",
    ]
)
"""Operations whose result is -inf where one of their arguments is."""
_FUSED = ("scaled_dot_product_attention", "_scaled_dot_product_attention_math")


def hiding_masks(graph: Graph) -> set[str]:
    """Returns the values that may be -inf in a whole row, because the inputs say where.

    A causal mask depends on sizes only and leaves each query a key; a learned bias is finite. Neither is returned.
    """
    given = {value.name for value in graph.inputs}
    infinite = {name for name in given if isinstance(out := graph.tensors[name], Tensor) and out.is_floating}
    infinite |= {name for name, array in graph.arrays.items() if array.fill == -math.inf}
    for node in graph.nodes:
        if node.base.startswith("sym."):
            continue
        names = set(refs(node.args))
        if not node.base.endswith("_like") and not node.base.startswith("new_") and names & given:
            given.add(node.name)
        if _is_infinite(node.args) or (node.base in _KEEPS and names & infinite):
            infinite.add(node.name)
    return given & infinite


def with_hiding_masks(graph: Graph) -> Graph:
    """Returns a graph whose fused attentions have `hides_rows` if their mask may be -inf in a whole row.

    PyTorch gives 0 there, and the softmax of MLX NaN.
    """
    masked = {
        node.name for node in graph.nodes if node.base in _FUSED and isinstance(node.args.get("attn_mask"), Ref)
    }
    hiding = hiding_masks(graph) if masked else set()
    nodes = [
        replace(node, args={**node.args, "hides_rows": True})
        if node.name in masked and node.args["attn_mask"].name in hiding
        else node
        for node in graph.nodes
    ]
    return replace(graph, nodes=nodes)


def _is_infinite(value: Any) -> bool:
    """Returns whether a number in the arguments of an operation is infinite; with a minus, it is -inf."""
    if isinstance(value, dict):
        return any(map(_is_infinite, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_is_infinite, value))
    return isinstance(value, float) and math.isinf(value)
