"""Which values of a graph are images, by what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icenet.core.porting.graph.layout_operations import ALONG, ELEMENTWISE, IMAGE_OPS
from icenet.core.porting.layers.mlx_layers import Layer
from icenet.core.porting.record import Node, Tensor, refs, users_of


class Images:
    """The uses of values by layers and operations that read images with channels last.

    Args:
        nodes: The nodes of a graph.
        layers: Its layers by path.
        tensors: What each value is.
    """

    def __init__(self, nodes: Sequence[Node], layers: dict[str, Layer], tensors: dict[str, Any]) -> None:
        self.layers, self.tensors = layers, tensors
        self.users = users_of(nodes)
        self._ending: set[str] = set()
        self._meeting: set[str] = set()
        for node in reversed(nodes):  # what reads a value comes after it
            users = [user for user in self.users.get(node.name, ()) if not _is_free(user)]
            if users and all(map(self._ends, users)):
                self._ending.add(node.name)
            if any(self._meets(user, node.name) for user in users):
                self._meeting.add(node.name)

    def shape(self, name: str) -> tuple[Any, ...]:
        tensor = self.tensors.get(name)
        return tensor.shape if isinstance(tensor, Tensor) else ()

    def reads_images(self, node: Node) -> bool:
        """Returns whether an operation is a layer or function that takes images."""
        if node.op == "layer":
            layer = self.layers[node.args["path"]]
            return layer.axes == "last" and len(self.shape(node.name)) > 2
        return node.base in IMAGE_OPS and len(self.shape(node.name)) > 2

    def is_for_images(self, node: Node) -> bool:
        """Returns whether layers that take images are all that read a value."""
        users = self.users.get(node.name, [])
        return bool(users) and all(user.op == "layer" and self.reads_images(user) for user in users)

    def ends_in_images(self, name: str) -> bool:
        """Returns whether what takes images is all that reads a result, or what is computed of its elements."""
        return name in self._ending

    def _ends(self, node: Node) -> bool:
        if self.reads_images(node):
            return True
        follows = node.base in ELEMENTWISE or node.base in ("pad", "slice", "narrow") or self._is_any(node)
        return follows and isinstance(node.out, Tensor) and node.name in self._ending

    def _is_any(self, node: Node) -> bool:
        return node.op == "layer" and self.layers[node.args["path"]].axes == "any"

    def meets_images(self, name: str) -> bool:
        """Returns whether a (B, C, 1, 1) is combined with a whole image, or read by what takes images."""
        return name in self._meeting

    def _meets(self, node: Node, name: str) -> bool:
        if self.reads_images(node):
            return True
        if node.base in ELEMENTWISE:
            others = [self.shape(other) for other in refs(node.args) if other != name]
            ndim = len(self.shape(name))
            if any(len(shape) == ndim and any(size != 1 for size in shape[2:]) for shape in others):
                return True
        follows = node.base in ELEMENTWISE or node.base in ALONG or node.base == "item" or self._is_any(node)
        return follows and node.name in self._meeting


def _is_free(node: Node) -> bool:
    """Returns whether a node reads no elements of a value."""
    return node.op in ("enter", "exit") or node.base == "sym.sym_size"


def same_memory(shape: tuple[Any, ...], have: tuple[int, ...], order: tuple[int, ...]) -> bool:
    """Returns whether two orders of the axes of a value are one in memory: axes of size 1 stand anywhere.

    Args:
        shape: The sizes of the axes.
        have, order: The axis at each place in memory.
    """
    wide = [[axis for axis in axes if shape[axis] != 1] for axes in (have, order)]
    return wide[0] == wide[1] and [shape[axis] for axis in have] == [shape[axis] for axis in order]
