"""Views of weights with quantized layers: packed, or their values (see `icenet.core.weights.quantization`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from icenet.core.weights.arrays import Array, WeightsView
from icenet.core.weights.packing import dequantize, quantize
from icenet.core.weights.quantization import Quantization
from icenet.core.weights.safetensors import Spec, spec_of

KINDS = ("weight", "scales", "biases")


class PackedWeights(WeightsView):
    """Weights by name, some layers of which are quantized.

    Attributes:
        layers: The settings of each quantized layer by path; its arrays are those of `KINDS`.
    """

    layers: Mapping[str, Quantization]

    def spec(self, name: str) -> Spec:
        """Returns the dtype and the shape of an array."""
        raise NotImplementedError


class StoredPacked(PackedWeights):
    """Weights of a file that has packed ones.

    Args:
        weights: The weights.
        layers: The settings of each quantized layer.
    """

    def __init__(self, weights: Mapping[str, Array], layers: Mapping[str, Quantization]) -> None:
        self._weights = self._names = weights
        self.layers = layers

    def __getitem__(self, name: str) -> Array:
        return self._weights[name]

    def spec(self, name: str) -> Spec:
        return spec_of(self._weights, name)


class PackedView(PackedWeights):
    """A view of weights in which the weight of some layers is three packed arrays.

    Args:
        weights: Weights by name, which have the floating weight of each of these layers, or at least its shape.
        layers: The settings of each layer.
    """

    def __init__(self, weights: Mapping[str, Array], layers: Mapping[str, Quantization]) -> None:
        self._weights, self.layers = weights, layers

    def parts(self, layer: str, kind: str) -> Array:
        """Returns an array of a layer; `kind` is one of `KINDS`."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> Array:
        layer, _, kind = name.rpartition(".")
        return self.parts(layer, kind) if layer in self.layers and kind in KINDS else self._weights[name]

    def spec(self, name: str) -> Spec:
        """Returns the dtype and the shape of an array."""
        layer, _, kind = name.rpartition(".")
        if layer not in self.layers or kind not in KINDS:
            return spec_of(self._weights, name)
        spec, quantization = spec_of(self._weights, f"{layer}.weight"), self.layers[layer]
        if kind == "weight":
            return Spec(np.dtype(np.uint32), quantization.packed_shape(spec.shape))
        return Spec(_at_most_fp32(spec.dtype), quantization.scales_shape(spec.shape))

    def __contains__(self, name: object) -> bool:
        layer, _, kind = str(name).rpartition(".")
        return name in self._weights or (layer in self.layers and kind in KINDS)

    def __iter__(self) -> Iterator[str]:
        for name in self._weights:
            layer, _, kind = name.rpartition(".")
            yield name
            if kind == "weight" and layer in self.layers:
                yield from (f"{layer}.{other}" for other in KINDS[1:])

    def __len__(self) -> int:
        return len(self._weights) + 2 * len(self.layers)


class QuantizedWeights(PackedView):
    """A view of floating weights whose layers are quantized when they are looked up."""

    def __init__(self, weights: Mapping[str, Array], layers: Mapping[str, Quantization]) -> None:
        super().__init__(weights, layers)
        self._last: tuple[str, tuple[Array, Array, Array]] | None = None

    def parts(self, layer: str, kind: str) -> Array:
        if self._last is None or self._last[0] != layer:  # the three arrays are looked up one after another
            self._last = None
            weight = self._weights[f"{layer}.weight"]
            self._last = layer, quantize(weight.astype(_at_most_fp32(weight.dtype), copy=False), self.layers[layer])
        return self._last[1][KINDS.index(kind)]


def _at_most_fp32(dtype: Any) -> Any:
    """Returns the dtype of the scales of a weight of a dtype: MLX computes on no GPU in float64."""
    return np.dtype(np.float32) if dtype.itemsize > 4 else dtype


class DequantizedWeights(WeightsView):
    """A view of packed weights as floating ones, computed when they are looked up.

    Attributes:
        packed: The packed weights.
        metadata: Metadata of the weights.

    Args:
        packed: The packed weights.
        metadata: The metadata.
        dtype: Dtype of the values; None is that of the scales, and the bits of `mlx.core.dequantize`.
        kept: Layers that stay packed.
    """

    def __init__(
        self,
        packed: PackedWeights,
        metadata: Mapping[str, str] = {},
        dtype: Any = None,
        kept: Collection[str] = (),
    ) -> None:
        self.packed, self.metadata = packed, dict(metadata)
        self._dtype = dtype
        self._layers = {path: found for path, found in packed.layers.items() if path not in kept}
        parts = {f"{path}.{kind}" for path in self._layers for kind in KINDS[1:]}
        self._names = [name for name in packed if name not in parts]

    def __getitem__(self, name: str) -> Array:
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in self._layers:
            return self.packed[name]
        spec = self.spec(name)
        found = np.empty(spec.shape, spec.dtype)
        weight, scales, biases = (self.packed[f"{layer}.{kind}"] for kind in KINDS)
        dequantize((weight, scales, biases), self._layers[layer], found, rounds_products=self._dtype is None)
        return found

    def spec(self, name: str) -> Spec:
        """Returns the dtype and the shape of an array."""
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in self._layers:
            return self.packed.spec(name)
        dtype = self.packed.spec(f"{layer}.scales").dtype if self._dtype is None else np.dtype(self._dtype)
        return Spec(dtype, self._layers[layer].shape(self.packed.spec(name).shape))


def packed_of(weights: Any) -> PackedWeights | None:
    """Returns the packed weights behind a view of dequantized ones; None if no layer is quantized."""
    found: PackedWeights | None = getattr(weights, "packed", None)
    return found
