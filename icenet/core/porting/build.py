"""From the record of a graph to the source of its port."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from icenet.core.porting import signature
from icenet.core.porting.graph.arguments import with_arguments
from icenet.core.porting.graph.collapse import collapse_layers
from icenet.core.porting.graph.dtypes import with_new_arrays_in
from icenet.core.porting.graph.formulas import with_activations
from icenet.core.porting.graph.functional import make_functional, with_exact_gradients, without_copies
from icenet.core.porting.graph.indices import detached_indices
from icenet.core.porting.graph.layout import channels_last
from icenet.core.porting.graph.masks import with_hiding_masks
from icenet.core.porting.graph.norms import with_rms_norms
from icenet.core.porting.graph.passed import with_passed_values
from icenet.core.porting.graph.plain_masks import with_plain_masks
from icenet.core.porting.graph.ranges import with_short_ranges
from icenet.core.porting.graph.writes import joined_writes
from icenet.core.porting.layers import attention, recurrent
from icenet.core.porting.layers.attention import Attention
from icenet.core.porting.layers.mlx_layers import Layer
from icenet.core.porting.layers.recurrent import Recurrent
from icenet.core.porting.names import flat, native, new_names
from icenet.core.porting.places import Place
from icenet.core.porting.record import Graph
from icenet.core.porting.source.writer import write
from icenet.core.porting.table import TABLE


@dataclass
class Plan:
    """The source of a port, and where its arrays come from."""

    source: str
    class_name: str
    layers: dict[str, Layer]
    graph: Graph
    train: Graph | None
    orders: dict[str, tuple[int, ...]]
    """The order of the axes in memory of each value that has another one than PyTorch's."""

    def to_torch(self, path: str, array: np.ndarray) -> np.ndarray:
        """Returns an array of the port, such as a gradient, in PyTorch's axes."""
        owner, _, leaf = path.rpartition(".")
        layer = self.layers.get(owner)
        if layer is not None and leaf in layer.permutations:
            return array.transpose(np.argsort(layer.permutations[leaf]))
        return array

    def arguments(self, flat: list[Any]) -> list[Any]:
        """Returns the arguments of the port in the order of its parameters, from its arrays in their order."""
        return signature.arguments(self.graph.signature, self.graph.inputs, flat)

    def native(self, weights: dict[str, np.ndarray], partial: bool = False) -> dict[str, np.ndarray]:
        """Returns the arrays that the port has, in MLX's axes, from PyTorch's by path.

        Args:
            weights: The arrays of the original.
            partial: Whether some may be absent.
        """
        wanted = self.wanted()
        found = {}
        for path, name in wanted.items():
            if partial and path not in weights:
                continue
            array = weights[path]
            owner, _, leaf = path.rpartition(".")
            layer = self.layers.get(owner)
            if layer is not None and leaf in layer.permutations:
                array = array.transpose(layer.permutations[leaf])
            found[name] = array
        return found

    def places(self) -> dict[str, Place]:
        """Returns where the port has each array of the original, by its path there; a shared one by all its paths."""
        arrays = {a.path: a for g in (self.graph, self.train) if g is not None for a in g.arrays.values()}
        found = {}
        for path, name in self.wanted().items():
            owner, _, leaf = path.rpartition(".")
            layer = self.layers.get(owner)
            axes = layer.permutations.get(leaf, ()) if layer is not None else ()
            found[path] = Place(name, tuple(axes), arrays[path].kind, arrays[path].is_saved)
        shared = {**self.graph.shared, **(self.train.shared if self.train is not None else {})}
        return found | {path: found[owner] for path, owner in shared.items() if owner in found}

    def wanted(self) -> dict[str, str]:
        """Returns the path in the port of each array, by its path in PyTorch."""
        paths: dict[str, str] = {}
        names = new_names(self.graph, self.train)
        for graph in (self.graph, self.train):
            for array in graph.arrays.values() if graph is not None else ():
                owner, _, leaf = array.path.rpartition(".")
                layer = self.layers.get(owner)
                if (layer is not None and leaf in layer.left_out) or array.value is not None:
                    continue
                is_constant = array.kind == "constant"
                constant = names.get(array.path, flat(array.path))
                paths[array.path] = constant if is_constant else native(array.path, names)
        return paths


def plan(
    graph: Graph,
    train: Graph | None,
    nhwc: bool,
    title: str,
    trace: bool = False,
    exact_masks: bool = False,
    dtype: str = "float32",
) -> Plan:
    """Returns the source of a port.

    Args:
        graph: The record in evaluation mode.
        train: The record in training mode, if there is one.
        nhwc: Whether images are given and returned with their channels last.
        title: First line of the source's docstring.
        trace: Whether the source records every value, to find an operation that differs.
        exact_masks: Whether gradients that are not finite are dropped where a mask leaves values out, as in PyTorch.
        dtype: The dtype of the weights, which new arrays have.
    """
    modes = [item for item in (graph, train) if item is not None]
    if dtype != "float32":
        modes = [with_new_arrays_in(item, dtype) for item in modes]
    prepared = [with_hiding_masks(make_functional(item)) for item in modes]
    prepared = prepared if trace else with_passed_values([_simple(item) for item in prepared])
    layers: dict[str, Layer] | None = None
    for item, functional in zip(modes, prepared, strict=True):
        found: dict[str, Layer] = {} if trace else collapse_layers(functional)[1]
        layers = found if layers is None else _in_both(layers, found, item)
    assert layers is not None
    layers |= attention.shared({path: layer for path, layer in layers.items() if isinstance(layer, Attention)})
    layers |= recurrent.shared({path: layer for path, layer in layers.items() if isinstance(layer, Recurrent)})
    written: list[Graph] = []
    orders: dict[str, tuple[int, ...]] = {}
    for functional in prepared:
        collapsed, _ = collapse_layers(functional, allowed=layers)
        last, order = channels_last(collapsed, layers, nhwc)
        written.append(with_exact_gradients(last) if exact_masks else last)
        orders = {**order, **orders}
    source = write(written[0], layers, written[1] if train is not None else None, title, trace)
    # the last class; it has another name than the original if a layer within it has that name
    class_name = re.findall(r"^class (\w+)\(", source, re.MULTILINE)[-1]
    return Plan(source, class_name, layers, graph, train, orders)


def _simple(graph: Graph) -> Graph:
    """Returns a graph as a person would write it: without copies, with known formulas, and with whole indices."""
    known = with_rms_norms(with_activations(without_copies(with_arguments(graph))))
    return with_short_ranges(detached_indices(joined_writes(with_plain_masks(known))))


def _in_both(layers: dict[str, Layer], train: dict[str, Layer], graph: Graph) -> dict[str, Layer]:
    """Returns the layers of the evaluation mode that are layers in training mode, too, as both modes need them."""
    called = {node.args["path"] for node in graph.nodes if node.op == "enter"}
    kept: dict[str, Layer | None] = {
        path: layer for path, layer in layers.items() if path in train or path not in called
    }
    for path, layer in kept.items():
        other = train.get(path)
        if isinstance(layer, Attention) and isinstance(other, Attention):
            kept[path] = attention.joined([layer, other])
    return {path: layer for path, layer in kept.items() if layer is not None}


def missing(graph: Graph) -> dict[str, list[str]]:
    """Returns the operations that the table lacks, with the places where they are used."""
    found: dict[str, list[str]] = {}
    collapsed, _ = collapse_layers(make_functional(graph))
    from icenet.core.porting.graph.functional import used_values

    used = used_values(collapsed)
    for node in collapsed.nodes:
        if node.op not in ("enter", "exit", "layer") and node.base not in TABLE and node.name in used:
            found.setdefault(node.op, []).append(str(node.place or node.name))
    return found
