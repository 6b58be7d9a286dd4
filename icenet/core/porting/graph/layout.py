"""Images with their channels last: MLX's convolutions, pools and norms read them so.

Each value of the graph has an order of its axes in memory. It starts at a convolution, and the operations after it
keep it: their dimensions are renumbered. `permute` is inserted where an operation needs the original's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from icenet.core.porting.graph.hoist import hoisted
from icenet.core.porting.graph.layout_operations import ALONG, ELEMENTWISE, IMAGE_OPS, REDUCTIONS
from icenet.core.porting.layers.mlx_layers import Layer
from icenet.core.porting.record import Graph, Node, Ref, Tensor, map_refs, refs

Order = tuple[int, ...]
"""The axis of the original at each axis in memory: (0, 2, 3, 1) for images with channels last."""


def channels_last(graph: Graph, layers: dict[str, Layer], nhwc: bool) -> tuple[Graph, dict[str, Order]]:
    """Returns the graph with the axes in memory, and the order of each value that has another one.

    Args:
        graph: A graph without operations in place.
        layers: Its layers by path.
        nhwc: Whether inputs and results with four axes have their channels last.
    """
    return _Pass(graph, layers, nhwc).run()


def _identity(ndim: int) -> Order:
    return tuple(range(ndim))


def last(ndim: int) -> Order:
    """Returns the order with the second axis last."""
    return (0, *range(2, ndim), 1)


class _Pass:
    def __init__(self, graph: Graph, layers: dict[str, Layer], nhwc: bool) -> None:
        self.graph, self.layers, self.nhwc = graph, layers, nhwc
        self.tensors: dict[str, Any] = {**graph.tensors, **{node.name: node.out for node in graph.nodes}}
        self.order: dict[str, Order] = {}
        self.alias: dict[str, str] = {}
        self.nodes: list[Node] = []
        self.made: dict[tuple[str, Order], tuple[str, int]] = {}
        self.depth: list[int] = [0]
        self.counter = 0
        self.frame = 0
        self.viewed: dict[str, tuple[int, str, list[Any]]] = {}
        """The call, the source and the shape of values that are reshapes."""
        self.source: dict[str, tuple[int, str]] = {}
        """The call and the source of values that have its elements in the same order."""
        self.new_tensors: dict[str, Any] = dict(graph.tensors)
        self.users: dict[str, list[Node]] = {}
        """The operations that read each value."""
        for node in graph.nodes:
            for name in set(refs(node.args)):
                self.users.setdefault(name, []).append(node)

    def run(self) -> tuple[Graph, dict[str, Order]]:
        for name, array in self.graph.arrays.items():
            owner, _, leaf = array.path.rpartition(".")
            if owner in self.layers and leaf in self.layers[owner].permutations:
                self.set(name, self.layers[owner].permutations[leaf])
        if self.nhwc:
            for ref in self.graph.inputs:
                if self.ndim(ref.name) == 4:
                    self.set(ref.name, last(4))
        for node in self.graph.nodes:
            self.node(node)
        output = map_refs(self.graph.output_tree, lambda ref: Ref(self.output(ref.name)))
        updates = {
            path: Ref(self.plain(value.name)) if isinstance(value, Ref) else value
            for path, value in self.graph.updates.items()
        }
        self.nodes = hoisted(self.nodes)
        if (
            self.nodes and self.nodes[-1].op != "exit"
        ):  # what the outputs need belongs to the call of the whole module
            end = max(index for index, node in enumerate(self.nodes) if node.op == "exit")
            self.nodes.append(self.nodes.pop(end))
        return replace(
            self.graph, nodes=self.nodes, output_tree=output, updates=updates, tensors=self.new_tensors
        ), self.order

    # ---- values

    def ndim(self, name: str) -> int:
        tensor = self.tensors.get(name)
        return tensor.ndim if isinstance(tensor, Tensor) else -1

    def shape(self, name: str) -> tuple[Any, ...]:
        return self.tensors[name].shape

    def of(self, name: str) -> Order | None:
        """Returns the order of a value, None if it is the original's."""
        return self.order.get(name)

    def set(self, name: str, order: Order | None) -> None:
        tensor = self.tensors.get(name)
        if order is not None and order != _identity(len(order)):
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
        have = self.order.get(name, _identity(self.ndim(name)))
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
        moved = self.view_in_order(name, order)
        if moved is None:
            dims = [have.index(axis) for axis in order]
            moved = ("permute", {"self": Ref(name), "dims": dims})
        self.nodes.append(Node(new, *moved, physical(tensor, order), place))
        if order != _identity(len(order)):
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
        return self.in_order(name, _identity(self.ndim(name))) if name in self.order else name

    def output(self, name: str) -> str:
        if self.nhwc and self.ndim(name) == 4:
            return self.in_order(name, last(4))
        return self.plain(name)

    def plain_all(self, value: Any) -> Any:
        return map_refs(value, lambda ref: Ref(self.plain(ref.name)))

    # ---- nodes

    def emit(self, node: Node, args: dict[str, Any], order: Order | None = None) -> None:
        out = node.out
        if isinstance(out, Tensor) and order is not None and order != _identity(len(order)):
            self.order[node.name] = order
            out = physical(out, order)
        self.nodes.append(replace(node, args=args, out=out))

    def node(self, node: Node) -> None:
        base = node.base
        if node.op in ("enter", "exit"):
            self.frame += 1
            args = map_refs(node.args, lambda ref: Ref(self.resolve(ref.name)))
            self.nodes.append(replace(node, args=args))
            return
        source = node.args.get("self", node.args.get("input"))
        name = self.resolve(source.name) if isinstance(source, Ref) else ""
        order = self.order.get(name)
        if node.op == "layer":
            self.layer(node, name)
        elif (
            base in IMAGE_OPS
            and self.ndim(name) >= (IMAGE_OPS[base] + 1 or 3)
            and self.ndim(name) > 1 + (not IMAGE_OPS[base])
        ):
            self.image(node, name)
        elif base == "sym.sym_size":
            dim = node.args["dim"] % max(self.ndim(name), 1)
            self.nodes.append(replace(node, args={"self": Ref(name), "dim": order.index(dim) if order else dim}))
        elif base in ELEMENTWISE:
            self.elementwise(node)
        elif base in ("cat", "stack"):
            self.join(node)
        elif base == "item":
            self.item(node, name)
        elif base == "expand_as":
            other = self.resolve(node.args["other"].name)
            target = self.order.get(other, _identity(self.ndim(other)))
            same_rank = self.ndim(name) == self.ndim(other)
            moved = self.in_order(name, target) if same_rank else self.plain(name)
            kept = other if same_rank else self.plain(other)
            self.emit(node, {"self": Ref(moved), "other": Ref(kept)}, target if same_rank else None)
        elif order is None:
            args = self.plain_all(node.args)
            self.emit(node, args)
            self.note_view(node, args)
        elif base in REDUCTIONS and not self.others(node):
            self.reduction(node, name, order)
        elif base in ALONG and not self.others(node):
            self.along(node, name, order, ALONG[base])
        elif base in ("permute", "transpose", "movedim", "t", "swapaxes"):
            self.permuted(node, name, order)
        elif base in ("flatten", "view", "reshape", "_unsafe_view") and self.merged(node, name, order):
            pass
        elif base in ("unsqueeze", "squeeze", "select"):
            self.changed_rank(node, name, order)
        elif base == "pad" and node.args.get("mode") == "constant":
            widths: list[Any] = list(node.args["pad"])
            per: dict[int, list[Any]] = {
                self.ndim(name) - 1 - index // 2: widths[index : index + 2] for index in range(0, len(widths), 2)
            }
            sides = {order.index(dim): pair for dim, pair in per.items()}
            pads: list[Any] = []
            for dim in reversed(range(min(sides), self.ndim(name))):
                pads += sides.get(dim, [0, 0])
            self.emit(node, {**node.args, "self": Ref(name), "pad": pads}, order)
        else:
            self.emit(node, self.plain_all(node.args))

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

    def others(self, node: Node) -> list[str]:
        return [
            key
            for key, value in node.args.items()
            if key not in ("self", "input")
            and list(refs(value))
            and any(isinstance(self.tensors.get(name), Tensor) for name in refs(value))
        ]

    def layer(self, node: Node, name: str) -> None:
        layer = self.layers[node.args["path"]]
        ndim = self.ndim(name)
        if layer.axes == "last" and ndim > 2:
            order: Order | None = last(ndim)
            self.emit(node, {**node.args, "self": Ref(self.in_order(name, last(ndim)))}, order)
        elif layer.axes == "any":
            self.emit(node, {**node.args, "self": Ref(name)}, self.order.get(name))
        else:
            self.emit(node, {**node.args, "self": Ref(self.plain(name))})

    def image(self, node: Node, name: str) -> None:
        rank = IMAGE_OPS[node.base]
        ndim = self.ndim(name)
        key = "self" if "self" in node.args else "input"
        unbatched = rank and ndim == rank + 1
        order = (*range(1, ndim), 0) if unbatched else last(ndim)
        rest = {k: self.plain_all(v) for k, v in node.args.items() if k != key}
        args = {**node.args, **rest, key: Ref(self.in_order(name, order))}
        if isinstance(node.out, list):
            outs = [physical(out, order) if isinstance(out, Tensor) and out.ndim == ndim else out for out in node.out]
            self.order[node.name] = order
            self.nodes.append(replace(node, args=args, out=outs))
        else:
            self.emit(node, args, order)

    def elementwise(self, node: Node) -> None:
        names = [self.resolve(name) for name in refs(node.args)]
        orders = [self.order[name] for name in names if name in self.order and self.ndim(name) == node.out.ndim]
        if not orders:
            self.emit(node, self.plain_all(node.args))
            return
        order = orders[0]
        ndim = node.out.ndim

        def aligned(ref: Ref) -> Ref:
            tensor = self.tensors.get(self.resolve(ref.name))
            if not isinstance(tensor, Tensor) or tensor.ndim == 0:
                return Ref(self.resolve(ref.name))
            name = self.resolve(ref.name)
            if tensor.ndim == ndim:
                return Ref(self.in_order(name, order))
            name = self.plain(name)
            self.counter += 1
            new = f"{name}_a{self.counter}"
            shape = (*[1] * (ndim - tensor.ndim), *tensor.shape)
            moved = [shape[axis] for axis in order]
            self.tensors[new] = Tensor(tuple(moved), tensor.dtype)
            if sum(size != 1 for size in shape) <= 1 and all(isinstance(size, int) for size in moved):
                while moved and moved[0] == 1:  # broadcasting adds the axes
                    moved.pop(0)
                held = self.with_shape(name, moved)
                if held is not None:
                    return Ref(held)
                self.nodes.append(
                    Node(
                        new,
                        "reshape",
                        {"self": Ref(name), "shape": moved},
                        Tensor(tuple(moved), tensor.dtype),
                        node.place,
                    )
                )
                return Ref(new)
            middle = f"{new}_m"
            self.tensors[middle] = Tensor(shape, tensor.dtype)
            self.nodes.append(
                Node(
                    middle,
                    "expand_rank",
                    {"self": Ref(name), "count": ndim - tensor.ndim},
                    Tensor(shape, tensor.dtype),
                    node.place,
                )
            )
            self.nodes.append(
                Node(new, "permute", {"self": Ref(middle), "dims": list(order)}, self.tensors[new], node.place)
            )
            return Ref(new)

        self.emit(node, map_refs(node.args, aligned), order)

    def join(self, node: Node) -> None:
        """Joins values along an axis, or a new one, in the order of the first that has another one."""
        key = "tensors"
        names = [self.resolve(ref.name) for ref in node.args[key]]
        orders = [self.order[name] for name in names if name in self.order]
        ndims = {self.ndim(name) for name in names}
        if not orders and node.base == "cat" and self.is_for_images(node):
            orders = [last(self.ndim(node.name))]
        if not orders or len(ndims) != 1:
            self.emit(node, self.plain_all(node.args))
            return
        order = new = orders[0]
        dim = node.args["dim"] % (len(order) + (node.base == "stack"))
        if node.base == "stack":
            if order[:dim] != tuple(range(dim)):
                self.emit(node, self.plain_all(node.args))
                return
            new = (*order[:dim], dim, *(axis + 1 for axis in order[dim:]))
        else:
            dim = order.index(dim)
        self.emit(node, {key: [Ref(self.in_order(name, order)) for name in names], "dim": dim}, new)

    def is_for_images(self, node: Node) -> bool:
        """Returns whether layers that take images with channels last are all that read a value."""
        users = self.users.get(node.name, [])
        layers = [self.layers[user.args["path"]] for user in users if user.op == "layer"]
        is_image = len(layers) == len(users) and all(layer.axes == "last" for layer in layers)
        return bool(users) and is_image and self.ndim(node.name) > 2

    def item(self, node: Node, name: str) -> None:
        order = self.order.get(name)
        if isinstance(node.out, Tensor) and order is not None and node.out.ndim == len(order):
            self.emit(node, {**node.args, "self": Ref(name)}, order)
        else:
            self.nodes.append(replace(node, args={**node.args, "self": Ref(name)}))

    def reduction(self, node: Node, name: str, order: Order) -> None:
        ndim = len(order)
        dims = node.args.get("dim")
        if dims is None or dims == []:
            if node.op.endswith(".dim") or "dim" in node.args or node.base not in ("argmax", "argmin", "median"):
                self.emit(node, {**node.args, "self": Ref(name)})
            else:
                self.emit(node, self.plain_all(node.args))
            return
        listed = dims if isinstance(dims, list) else [dims]
        logical = [dim % ndim for dim in listed]
        moved = [order.index(dim) for dim in logical]
        keep = bool(node.args.get("keepdim", False))
        args = {**node.args, "self": Ref(name), "dim": sorted(moved) if isinstance(dims, list) else moved[0]}
        if keep:
            new = order
        else:
            kept = [axis for axis in order if axis not in logical]
            new = tuple(sorted(kept).index(axis) for axis in kept)
        if isinstance(node.out, list):
            if new != _identity(len(new)):
                self.order[node.name] = new
            outs = [physical(out, new) if isinstance(out, Tensor) else out for out in node.out]
            self.nodes.append(replace(node, args=args, out=outs))
        else:
            self.emit(node, args, new)

    def along(self, node: Node, name: str, order: Order, key: str) -> None:
        dims = node.args.get(key)
        if dims is None or dims == []:
            self.emit(node, self.plain_all(node.args))
            return
        moved = (
            [order.index(dim % len(order)) for dim in dims]
            if isinstance(dims, list)
            else order.index(dims % len(order))
        )
        args = {**node.args, "self": Ref(name), key: moved}
        if isinstance(node.out, list):
            self.order[node.name] = order
            outs = [physical(out, order) if isinstance(out, Tensor) else out for out in node.out]
            self.nodes.append(replace(node, args=args, out=outs))
        else:
            self.emit(node, args, order)

    def permuted(self, node: Node, name: str, order: Order) -> None:
        ndim = len(order)
        axes = list(range(ndim))
        if node.base == "permute":
            axes = [dim % ndim for dim in node.args["dims"]]
        elif node.base in ("transpose", "swapaxes"):
            first, second = (
                node.args.get("dim0", node.args.get("axis0", 0)),
                node.args.get("dim1", node.args.get("axis1", 1)),
            )
            axes[first % ndim], axes[second % ndim] = axes[second % ndim], axes[first % ndim]
        else:
            self.emit(node, self.plain_all(node.args))
            return
        new = tuple(axes.index(axis) for axis in order)
        self.alias_to(node, name, new)

    def alias_to(self, node: Node, name: str, new: Order) -> None:
        """Gives a value another order of its axes, without an operation."""
        self.nodes.append(Node(node.name, "alias", {"self": Ref(name)}, physical(node.out, new), node.place))
        if new != _identity(len(new)):
            self.order[node.name] = new

    def merged(self, node: Node, name: str, order: Order) -> bool:
        """Joins neighbouring axes that are neighbours in memory, too. Returns whether this is such a reshape."""
        shape, out = self.shape(name), node.out.shape
        ndim, count = len(shape), len(shape) - len(out)
        if count < 0:
            return False
        start = next((index for index in range(len(out)) if index >= ndim or shape[index] != out[index]), len(out))
        if start >= len(out):
            start = len(out) - 1
        end = start + count
        if tuple(shape[:start]) != tuple(out[:start]) or tuple(shape[end + 1 :]) != tuple(out[start + 1 :]):
            return False
        logical = list(range(start, end + 1))
        wide = [dim for dim in logical if shape[dim] != 1]
        positions = sorted(order.index(dim) for dim in logical)
        contiguous = positions == list(range(positions[0], positions[0] + len(positions)))
        in_sequence = [order[position] for position in positions if order[position] in wide] == wide
        if not contiguous or not in_sequence or count == 0:
            return False
        before = list(order[: positions[0]])
        after = list(order[positions[-1] + 1 :])

        def renumber(axis: int) -> int:
            return axis if axis < start else axis - count

        new = (*map(renumber, before), start, *map(renumber, after))
        flat = Node(node.name, "flatten", {}, node.out, node.place)
        self.emit(flat, {"self": Ref(name), "start_dim": positions[0], "end_dim": positions[-1]}, new)
        return True

    def changed_rank(self, node: Node, name: str, order: Order) -> None:
        ndim = len(order)
        dim: Any = node.args.get("dim")
        if node.base == "unsqueeze":
            dim = dim % (ndim + 1)
            new = (
                *(axis + (axis >= dim) for axis in order[:dim]),
                dim,
                *(axis + (axis >= dim) for axis in order[dim:]),
            )
            self.emit(node, {"self": Ref(name), "dim": dim}, new)
            return
        if not isinstance(dim, (int, list)) or (node.base == "select" and isinstance(dim, list)):
            self.emit(node, self.plain_all(node.args))
            return
        dims = [item % ndim for item in (dim if isinstance(dim, list) else [dim])]
        if node.base == "squeeze":
            dims = [item for item in dims if self.shape(name)[item] == 1]
        kept = [axis for axis in order if axis not in dims]
        new = tuple(sorted(kept).index(axis) for axis in kept)
        moved = [order.index(item) for item in dims]
        if node.base == "select":
            self.emit(node, {**node.args, "self": Ref(name), "dim": moved[0]}, new)
        else:
            self.emit(replace(node, op="squeeze.dims"), {"self": Ref(name), "dim": moved}, new)


def physical(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Returns shape and dtype of a value with its axes in an order."""
    return Tensor(tuple(tensor.shape[axis] for axis in order), tensor.dtype)
