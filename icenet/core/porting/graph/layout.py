"""Images with their channels last: MLX's convolutions, pools and norms read them so.

Each value of the graph has an order of its axes in memory. It starts at a convolution, and the operations after it
keep it: their dimensions are renumbered. `permute` is inserted where an operation needs the original's order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from icenet.core.porting.graph.hoist import hoisted
from icenet.core.porting.graph.layout_operations import ALONG, ELEMENTWISE, IMAGE_OPS, REDUCTIONS
from icenet.core.porting.graph.orders import Order, Orders, axes_of, identity, last, physical
from icenet.core.porting.layers.mlx_layers import Layer
from icenet.core.porting.record import Graph, Node, Ref, Tensor, map_refs, refs


def channels_last(graph: Graph, layers: dict[str, Layer], nhwc: bool) -> tuple[Graph, dict[str, Order]]:
    """Returns the graph with the axes in memory, and the order of each value that has another one.

    Args:
        graph: A graph without operations in place.
        layers: Its layers by path.
        nhwc: Whether inputs and results with four axes have their channels last.
    """
    return _Pass(graph, layers, nhwc).run()


class _Pass(Orders):
    """Writes the operations in the orders of their values."""

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
        sequences = {path for path, module in self.graph.modules.items() if module.class_name == "Sequential"}
        self.nodes = hoisted(self.nodes, sequences, self.order)
        # what the outputs need belongs to the call of the whole module
        if self.nodes and self.nodes[-1].op != "exit":
            end = max(index for index, node in enumerate(self.nodes) if node.op == "exit")
            self.nodes.append(self.nodes.pop(end))
        return replace(
            self.graph, nodes=self.nodes, output_tree=output, updates=updates, tensors=self.new_tensors
        ), self.order

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
            self.expanded(node, name)
        elif order is None and base in ("permute", "transpose", "swapaxes") and self.becomes_image(node):
            self.permuted(node, name, identity(self.ndim(name)))
        elif order is None and base == "unsqueeze" and self.spread(node, name):
            pass
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
        elif self.reshaped(node, name, order):
            pass
        elif base in ("unsqueeze", "squeeze", "select"):
            self.changed_rank(node, name, order)
        elif base == "pad" and node.args.get("mode") == "constant":
            self.padded(node, name, order)
        elif base == "prelu":
            weight = self.plain_all(node.args["weight"])
            self.emit(node, {"self": Ref(name), "weight": weight, "channels": order.index(1)}, order)
        else:
            self.emit(node, self.plain_all(node.args))

    def expanded(self, node: Node, name: str) -> None:
        """Writes expand_as, in the order of the other value if both have as many axes."""
        other = self.resolve(node.args["other"].name)
        target = self.order.get(other, identity(self.ndim(other)))
        same_rank = self.ndim(name) == self.ndim(other)
        moved = self.in_order(name, target) if same_rank else self.plain(name)
        kept = other if same_rank else self.plain(other)
        self.emit(node, {"self": Ref(moved), "other": Ref(kept)}, target if same_rank else None)

    def padded(self, node: Node, name: str, order: Order) -> None:
        """Writes a padding, whose numbers begin with the last axis."""
        widths: list[Any] = list(node.args["pad"])
        per: dict[int, list[Any]] = {
            self.ndim(name) - 1 - index // 2: widths[index : index + 2] for index in range(0, len(widths), 2)
        }
        sides = {order.index(dim): pair for dim, pair in per.items()}
        pads: list[Any] = []
        for dim in reversed(range(min(sides), self.ndim(name))):
            pads += sides.get(dim, [0, 0])
        self.emit(node, {**node.args, "self": Ref(name), "pad": pads}, order)

    def becomes_image(self, node: Node) -> bool:
        """Returns whether a change of axes makes an image of a value with channels last.

        Three axes may be any; four are an image.
        """
        ndim = self.ndim(node.name)
        axes = axes_of(node)
        if axes is None or ndim < 3 or tuple(map(axes.index, range(ndim))) != last(ndim):
            return False
        return ndim > 3 or self.images.ends_in_images(node.name)

    def spread(self, node: Node, name: str) -> bool:
        """Writes x[:, :, None, None] as x[:, None, None] if it meets images. Returns whether it did."""
        ndim, shape = self.ndim(node.name), self.shape(node.name)
        frame = self.frame
        while self.ndim(name) > 2 and frame == self.frame:
            frame, name = self.source.get(name, (-1, ""))
        is_spread = ndim > 3 and tuple(shape[2:]) == (1,) * (ndim - 2) and tuple(shape[:2]) == self.shape_of(name)
        if not is_spread or frame != self.frame or name in self.order or not self.images.meets_images(node.name):
            return False
        for dim in range(1, ndim - 2):
            new, out = f"{node.name}_s{dim}", Tensor((shape[0], *[1] * dim, shape[1]), node.out.dtype)
            self.nodes.append(Node(new, "unsqueeze", {"self": Ref(name), "dim": dim}, out, node.place))
            self.tensors[new], name = out, new
        self.emit(node, {"self": Ref(name), "dim": ndim - 2}, last(ndim))
        return True

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
        if not orders and node.base == "cat" and self.images.is_for_images(node):
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
            if new != identity(len(new)):
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
        axes = axes_of(node)
        if axes is None:
            self.emit(node, self.plain_all(node.args))
            return
        new = tuple(axes.index(axis) for axis in order)
        self.alias_to(node, name, new)

    def alias_to(self, node: Node, name: str, new: Order) -> None:
        """Gives a value another order of its axes, without an operation."""
        self.nodes.append(Node(node.name, "alias", {"self": Ref(name)}, physical(node.out, new), node.place))
        if new != identity(len(new)):
            self.order[node.name] = new

    def reshaped(self, node: Node, name: str, order: Order) -> bool:
        """Writes a reshape that joins or splits neighbouring axes. Returns whether this is one."""
        if node.base not in ("flatten", "view", "reshape", "_unsafe_view"):
            return False
        return self.merged(node, name, order) or (node.base != "flatten" and self.split(node, name, order))

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

    def split(self, node: Node, name: str, order: Order) -> bool:
        """Makes several neighbouring axes of one, as [B, C, H*W] to [B, C, H, W]. Returns whether this is that."""
        shape, out = self.shape(name), node.out.shape
        count = len(out) - len(shape)
        at = next((index for index, size in enumerate(shape) if size != out[index]), len(shape)) if count > 0 else 0
        if count <= 0 or at == len(shape) or tuple(shape[at + 1 :]) != tuple(out[at + count + 1 :]):
            return False
        new: list[int] = []
        for axis in order:
            new += range(at, at + count + 1) if axis == at else [axis + count * (axis > at)]
        key = "size" if "size" in node.args else "shape"
        self.emit(node, {"self": Ref(name), key: [node.args[key][axis] for axis in new]}, tuple(new))
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
        kept = [axis for axis in order if self.shape(name)[axis] != 1]
        if dim is None and node.base == "squeeze" and kept == sorted(kept):  # (B, 1, 1, C), as (B, C, 1, 1)
            self.emit(node, {"self": Ref(name)}, tuple(range(len(kept))))
            return
        if not isinstance(dim, (int, list)) or (node.base == "select" and isinstance(dim, list)):
            self.emit(node, self.plain_all(node.args))
            return
        dims = [item % ndim for item in (dim if isinstance(dim, list) else [dim])]
        if node.base == "squeeze" and len(dims) > ndim - node.out.ndim:  # an open size may be 1, too
            dims = [item for item in dims if self.shape(name)[item] == 1]
        kept = [axis for axis in order if axis not in dims]
        new = tuple(sorted(kept).index(axis) for axis in kept)
        moved = [order.index(item) for item in dims]
        if node.base == "select":
            self.emit(node, {**node.args, "self": Ref(name), "dim": moved[0]}, new)
        else:
            self.emit(replace(node, op="squeeze.dims"), {"self": Ref(name), "dim": moved}, new)
