"""Norms that the original writes by hand.

The formula of an RMS norm, x * rsqrt(mean(x^2) + eps), becomes one operation. A module that is nothing but a norm
becomes a layer of mlx.nn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from icenet.core.porting.graph.calls import Call
from icenet.core.porting.graph.orders import axes_of
from icenet.core.porting.layers.mlx_layers import Layer
from icenet.core.porting.record import Graph, Node, Ref, Tensor, refs, users_of


def with_rms_norms(graph: Graph) -> Graph:
    """Returns a graph in which the formula of an RMS norm over the last axis is one operation, with its weight.

    It is left as it is if a part of it is used elsewhere or is the result of a module. MLX's function computes in
    fp32, so the formula has to: that of a model in bfloat16 converts its input.
    """
    found = _Norms(graph)
    return replace(graph, nodes=list(found.nodes()))


class _Norms:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.tensors = graph.values()
        self.by_name = {node.name: node for node in graph.nodes}
        self.users, self.results = users_of(graph.nodes), graph.results()

    def nodes(self) -> Iterator[Node]:
        made: dict[str, Node] = {}
        removed: set[str] = set()
        for node in self.graph.nodes:
            found = self.norm(node)
            if found is None:
                continue
            norm, parts = found
            within = parts - {node.name}
            if within & self.results or any(user.name not in parts for name in within for user in self.users[name]):
                continue
            weighted = self.weighted(norm)
            made[weighted.name] = weighted
            removed |= parts - {weighted.name} if weighted.name == node.name else parts
        for node in self.graph.nodes:
            if node.name in made:
                yield made[node.name]
            elif node.name not in removed:
                yield node

    def norm(self, node: Node) -> tuple[Node, set[str]] | None:
        """Returns the norm of which a node is the result, and the operations of its formula."""
        for x, factor in _factors(node):
            tensor = self.tensors.get(x)
            if not isinstance(tensor, Tensor) or tensor.dtype != "float32" or node.out != tensor or not tensor.ndim:
                continue
            inner = self.mean_of_squares(factor, node.base == "div", x)
            if inner is not None:
                eps, parts = inner
                args = {"input": Ref(x), "normalized_shape": [tensor.shape[-1]], "weight": None, "eps": eps}
                return replace(node, op="rms_norm", args=args), {node.name, *parts}
        return None

    def mean_of_squares(self, name: str, is_root: bool, x: str) -> tuple[float, set[str]] | None:
        """Returns eps of rsqrt(mean(x^2) + eps), and the operations of which it is made.

        Args:
            name: The value.
            is_root: Whether the value is the root, by which x is divided.
            x: The value that is normalized.
        """
        parts = {name}
        node = self.by_name.get(name)
        if node is not None and node.base == "reciprocal" and not is_root:
            is_root, name = True, _given(node)
            node = self.by_name.get(name)
            parts.add(name)
        power = 0.5 if is_root else -0.5
        if node is None or not (
            node.base == ("sqrt" if is_root else "rsqrt")
            or (node.base == "pow" and node.args.get("exponent") == power)
        ):
            return None
        total = self.by_name.get(_given(node))
        if total is None or total.base != "add" or total.args.get("alpha", 1) != 1:
            return None
        eps, mean = total.args.get("other"), self.by_name.get(_given(total))
        if not isinstance(eps, (int, float)) or mean is None or mean.base != "mean" or not mean.args.get("keepdim"):
            return None
        square = self.by_name.get(_given(mean))
        ndim = self.tensors[x].ndim
        axes = mean.args.get("dim")
        if square is None or axes not in ([-1], [ndim - 1]) or mean.out.dtype != "float32":
            return None
        is_square = (
            square.base == "square"
            or (square.base == "pow" and square.args.get("exponent") == 2)
            or (square.base == "mul" and square.args.get("other") == Ref(x))
        )
        if not is_square or _given(square) != x:
            return None
        return float(eps), {*parts, total.name, mean.name, square.name}

    def weighted(self, norm: Node) -> Node:
        """Returns a norm with the weight by which alone it is multiplied, or as it is."""
        users = self.users.get(norm.name, [])
        node = users[0] if len(users) == 1 and norm.name not in self.results else None
        if node is None or node.base != "mul" or node.out != norm.out:
            return norm
        for x, weight in _factors(node):
            if x == norm.name and self.tensors.get(weight) == Tensor(norm.out.shape[-1:], norm.out.dtype):
                return replace(node, op="rms_norm", args={**norm.args, "weight": Ref(weight)})
        return norm


def _given(node: Node) -> str:
    source = node.args.get("self")
    return source.name if isinstance(source, Ref) else ""


def _factors(node: Node) -> Iterator[tuple[str, str]]:
    """Yields the factors of a product in both orders, and those of a quotient."""
    first, second = node.args.get("self"), node.args.get("other")
    if node.base not in ("mul", "div") or not isinstance(first, Ref) or not isinstance(second, Ref):
        return
    if node.base == "mul":
        yield second.name, first.name
    if not node.args.get("rounding_mode"):
        yield first.name, second.name


def norm_of(graph: Graph, call: Call) -> Layer | None:
    """Returns the layer of mlx.nn for a module that is an RMS or layer norm with its own parameters, or None.

    A layer norm may be over the channels of images: then its axes are changed before, and changed back.
    """
    given, items = list(refs(call.given)), call.items
    nodes = [item for item in items if isinstance(item, Node)]
    if len(given) != 1 or len(nodes) != len(items) or len(nodes) not in (1, 3):
        return None
    node, source = nodes[len(nodes) // 2], Ref(given[0])
    if len(nodes) == 3:
        ndim = node.out.ndim if isinstance(node.out, Tensor) else 0
        first, last = [0, *range(2, ndim), 1], [0, ndim - 1, *range(1, ndim - 1)]
        if axes_of(nodes[0]) != first or axes_of(nodes[2]) != last or nodes[2].args["self"] != Ref(node.name):
            return None
        if nodes[0].args["self"] != source or node.base != "layer_norm":
            return None
        source = Ref(nodes[0].name)
    if node.base not in ("rms_norm", "layer_norm") or node.args["input"] != source:
        return None
    if call.results != Ref(nodes[-1].name) or len(node.args["normalized_shape"]) != 1:
        return None
    own = {array.path: array.kind for array in graph.arrays.values() if array.path.startswith(f"{call.path}.")}
    used = {key: next(refs(node.args.get(key)), None) for key in ("weight", "bias")}
    read = {key: graph.arrays[name].path for key, name in used.items() if name in graph.arrays}
    if read != {key: f"{call.path}.{key}" for key, name in used.items() if name is not None} or "weight" not in read:
        return None
    if own != dict.fromkeys(read.values(), "parameter"):
        return None
    size, eps = node.args["normalized_shape"][0], node.args["eps"]
    keywords = {} if eps == 1e-5 else {"eps": eps}
    if node.base == "rms_norm":
        return Layer("nn.RMSNorm", [size], keywords)
    keywords |= {} if "bias" in read else {"bias": False}
    is_image = len(nodes) == 3
    return Layer(
        "nn.LayerNorm", [size], keywords, "last" if is_image else "same", node.out.ndim - 2 if is_image else 0
    )
