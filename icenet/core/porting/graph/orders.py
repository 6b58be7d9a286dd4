"""The order of the axes in memory of each value of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from icenet.core.porting.graph.images import Images, same_memory
from icenet.core.porting.layers.mlx_layers import Layer
from icenet.core.porting.record import Graph, Node, Ref, Tensor, map_refs

Order = tuple[int, ...]
"""The axis of the original at each axis in memory: (0, 2, 3, 1) for images with channels last."""


def identity(ndim: int) -> Order:
    return tuple(range(ndim))


def last(ndim: int) -> Order:
    """Returns the order with the second axis last."""
    return (0, *range(2, ndim), 1)


def physical(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Returns shape and dtype of a value with its axes in an order."""
    return Tensor(tuple(tensor.shape[axis] for axis in order), tensor.dtype)


def axes_of(node: Node) -> list[int] | None:
    """Returns the axes of its argument in the order in which an operation has them; None if it changes more."""
    if not isinstance(node.out, Tensor) or node.base not in ("permute", "transpose", "swapaxes"):
        return None
    ndim = node.out.ndim
    if not ndim:  # of one number, which has an axis 0 in PyTorch
        return []
    if node.base == "permute":
        return [dim % ndim for dim in node.args["dims"]]
    axes = list(range(ndim))
    first, second = (node.args.get(f"dim{number}", node.args.get(f"axis{number}", number)) for number in (0, 1))
    axes[first % ndim], axes[second % ndim] = axes[second % ndim], axes[first % ndim]
    return axes


class Orders:
    """The orders of the values so far, and the nodes of the new graph."""

    def __init__(self, graph: Graph, layers: dict[str, Layer], nhwc: bool) -> None:
        self.graph, self.layers, self.nhwc = graph, layers, nhwc
        self.tensors = graph.values()
        self.order: dict[str, Order] = {}
        self.alias: dict[str, str] = {}
        self.nodes: list[Node] = []
        self.made: dict[tuple[str, Order], tuple[str, int]] = {}
        self.counter = 0
        self.frame = 0
        self.viewed: dict[str, tuple[int, str, list[Any]]] = {}
        """The call, the source and the shape of values that are reshapes."""
        self.source: dict[str, tuple[int, str]] = {}
        """The call and the source of values that have its elements in the same order."""
        self.new_tensors: dict[str, Any] = dict(graph.tensors)
        self.images = Images(graph.nodes, layers, self.tensors)

    def ndim(self, name: str) -> int:
        tensor = self.tensors.get(name)
        return tensor.ndim if isinstance(tensor, Tensor) else -1

    def shape(self, name: str) -> tuple[Any, ...]:
        return self.tensors[name].shape

    def set(self, name: str, order: Order | None) -> None:
        tensor = self.tensors.get(name)
        if order is not None and order != identity(len(order)):
            self.order[name] = order
        if isinstance(tensor, Tensor) and name in self.new_tensors and name in self.order:
            self.new_tensors[name] = physical(tensor, self.order[name])

    def resolve(self, name: str) -> str:
        while name in self.alias:
            name = self.alias[name]
        return name

    def in_order(self, name: str, order: Order) -> str:
        """Returns the name of a value whose axes are in an order; it is inserted if there is none yet."""
        name = self.resolve(name)
        have = self.order.get(name, identity(self.ndim(name)))
        if have == order:
            return name
        key = (name, order)
        if key in self.made and self.made[key][1] == self.frame:
            return self.made[key][0]
        self.counter += 1
        new = f"{name}_p{self.counter}"
        tensor = self.tensors[name]
        self.tensors[new] = tensor
        place = self.nodes[-1].place if self.nodes else None
        if same_memory(tensor.shape, have, order):
            moved = "alias", {"self": Ref(name)}
        else:
            dims = [have.index(axis) for axis in order]
            moved = self.view_in_order(name, order) or ("permute", {"self": Ref(name), "dims": dims})
        self.nodes.append(Node(new, *moved, physical(tensor, order), place))
        if order != identity(len(order)):
            self.order[new] = order
        self.made[key] = (new, self.frame)
        return new

    def view_in_order(self, name: str, order: Order) -> tuple[str, dict[str, Any]] | None:
        """Returns the reshape that makes a value with its axes in an order, None if that takes a transpose.

        Axes of size 1 may stand anywhere: the (B, C, 1, 1) of squeeze and excitation is (B, 1, 1, C).
        """
        frame, source, shape = self.viewed.get(name, (-1, "", []))
        wide = [axis for axis in order if self.shape(name)[axis] != 1]
        if not shape or frame != self.frame or name in self.order or wide != sorted(wide):
            return None
        return "reshape", {"self": Ref(source), "shape": [shape[axis] for axis in order]}

    def plain(self, name: str) -> str:
        name = self.resolve(name)
        return self.in_order(name, identity(self.ndim(name))) if name in self.order else name

    def output(self, name: str) -> str:
        if self.nhwc and self.ndim(name) == 4:
            return self.in_order(name, last(4))
        return self.plain(name)

    def plain_all(self, value: Any) -> Any:
        return map_refs(value, lambda ref: Ref(self.plain(ref.name)))

    def emit(self, node: Node, args: dict[str, Any], order: Order | None = None) -> None:
        out = node.out
        if isinstance(out, Tensor) and order is not None and order != identity(len(order)):
            self.order[node.name] = order
            out = physical(out, order)
        self.nodes.append(replace(node, args=args, out=out))

    def note_view(self, node: Node, args: dict[str, Any]) -> None:
        """Notes the shape of a reshape, and the source of what has its elements in the same order."""
        if node.base in ("view", "reshape", "_unsafe_view", "unsqueeze"):
            self.source[node.name] = (self.frame, args["self"].name)
        if node.base in ("view", "reshape", "_unsafe_view"):
            shape = list(args.get("shape", args.get("size", [])))
            self.viewed[node.name] = (self.frame, args["self"].name, shape)

    def with_shape(self, name: str, shape: list[Any]) -> str | None:
        """Returns a value or what it is a view of, the one that has a shape: weight for weight[:, None, None]."""
        frame = self.frame
        while list(self.shape(name)) != shape or name in self.order:
            frame, name = self.source.get(name, (-1, ""))
            if frame != self.frame:
                return None
        return name

    def shape_of(self, name: str) -> tuple[Any, ...]:
        return tuple(self.shape(name)) if self.ndim(name) >= 0 else ()
