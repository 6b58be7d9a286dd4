"""Activations that the original writes as a formula, such as 0.5 x (1 + tanh(...)), and MLX has as a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from icenet.core.porting.graph.calls import Call
from icenet.core.porting.layers.mlx_layers import Layer
from icenet.core.porting.record import Graph, Node, Ref, Tensor, refs, users_of

_POINTS = np.array([-7.3, -2.9, -1.0, -0.31, 0.013, 0.57, 1.4, 3.1, 6.7])
"""Inputs at which formulas are compared."""


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _erf(x: np.ndarray) -> np.ndarray:
    return np.array([math.erf(value) for value in x])


_INNER: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "tanh": np.tanh,
    "erf": _erf,
    "sigmoid": _sigmoid,
    "square": np.square,
}
"""The operations of formulas, in float64."""
_KNOWN: list[tuple[str, dict[str, Any], np.ndarray]] = [
    ("gelu", {}, _POINTS * (1 + _erf(_POINTS / math.sqrt(2))) / 2),
    (
        "gelu",
        {"approximate": "tanh"},
        0.5 * _POINTS * (1 + np.tanh(math.sqrt(2 / math.pi) * (_POINTS + 0.044715 * _POINTS**3))),
    ),
    ("gelu", {"approximate": "sigmoid"}, _POINTS * _sigmoid(1.702 * _POINTS)),
    ("silu", {}, _POINTS * _sigmoid(_POINTS)),
]
"""The activations: the operation, its options, and its values."""
_LONGEST = 16
"""The number of operations of the longest formula."""


def with_activations(graph: Graph) -> Graph:
    """Returns a graph in which a formula of an activation is one operation.

    A formula is known by its values, as there are many ways to write one. It is left as it is if a part of it is used
    elsewhere or is the result of a module.
    """
    tensors = graph.values()
    by_name = {node.name: node for node in graph.nodes}
    users, results = users_of(graph.nodes), graph.results()
    found: dict[str, Node] = {}
    removed: set[str] = set()
    for node in reversed(graph.nodes):
        if node.base not in ("mul", "div") or node.name in removed:
            continue
        for x, inner in _parts(node, by_name):
            within = inner - {node.name}
            is_used_elsewhere = within & results or any(
                user.name not in inner for name in within for user in users[name]
            )
            if tensors.get(x) != node.out or is_used_elsewhere:
                continue
            values = _value(node.name, by_name, inner, {})
            known = next((item for item in _KNOWN if np.allclose(values, item[2], rtol=1e-9, atol=0)), None)
            if known is not None:
                operation, options, _ = known
                found[node.name] = replace(node, op=operation, args={"self": Ref(x), **options})
                removed |= within
                break
    nodes = [found.get(node.name, node) for node in graph.nodes if node.name not in removed]
    return replace(graph, nodes=nodes)


def _parts(last: Node, by_name: dict[str, Node]) -> Iterator[tuple[str, set[str]]]:
    """Yields each value of which a node may be a formula, and the operations of that formula."""
    inner = _above(last, by_name, None)[0]
    for x in dict.fromkeys(name for part in sorted(inner) for name in refs(by_name[part].args)):
        found, inputs = _above(last, by_name, x)
        if inputs == {x} and any(by_name[name].base in ("tanh", "erf", "sigmoid") for name in found):
            yield x, found


def _above(last: Node, by_name: dict[str, Node], x: str | None) -> tuple[set[str], set[str]]:
    """Returns the operations of which a node is the result, up to a value, and their inputs."""
    inner: set[str] = set()
    inputs: set[str] = set()
    pending = [last.name]
    while pending and len(inner) < _LONGEST:
        name = pending.pop()
        node = by_name.get(name)
        if name == x or node is None or not _is_inner(node, last.out):
            inputs.add(name)
        elif name not in inner:
            inner.add(name)
            pending.extend(refs(node.args))
    return inner, inputs | set(pending)


def _is_inner(node: Node, out: Any) -> bool:
    """Returns whether a node is an operation of formulas, of values with a given shape and dtype."""
    is_plain = isinstance(node.out, Tensor) and node.out == out and node.out.is_floating
    return (
        is_plain
        and node.base in _INNER
        and node.args.get("alpha", 1) == 1
        and not node.args.get("rounding_mode")
        and all(isinstance(item, (Ref, int, float)) for item in _operands(node))
    )


def _operands(node: Node) -> list[Any]:
    return [node.args[name] for name in ("self", "other", "exponent") if name in node.args]


def _value(name: str, by_name: dict[str, Node], inner: set[str], known: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the values of a formula at `_POINTS`."""
    if name not in inner:
        return _POINTS
    if name not in known:
        node = by_name[name]
        given = [
            _value(item.name, by_name, inner, known) if isinstance(item, Ref) else np.float64(item)
            for item in _operands(node)
        ]
        with np.errstate(all="ignore"):
            known[name] = np.asarray(_INNER[node.base](*given)) + 0 * _POINTS
    return known[name]


def activation_of(call: Call) -> Layer | None:
    """Returns the layer of mlx.nn for a module that applies one activation to its argument, or None."""
    given, items = list(refs(call.given)), call.items
    if len(items) != 1 or len(given) != 1 or not isinstance(items[0], Node):
        return None
    node = items[0]
    if node.base not in ("gelu", "silu") or node.args.get("self") != Ref(given[0]) or call.results != Ref(node.name):
        return None
    if node.base == "silu":
        return Layer("nn.SiLU", axes="any", is_stateless=True)
    approximate = node.args.get("approximate", "none")
    keywords = {"tanh": {"approx": "tanh"}, "sigmoid": {"approx": "fast"}}.get(approximate, {})
    return Layer("nn.GELU", [], dict(keywords), "any", is_stateless=True)
