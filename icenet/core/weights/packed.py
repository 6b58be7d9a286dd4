"""Layers whose weights are quantized, in the format of MLX: `weight` with packed numbers, `scales` and `biases`.

A group of `group_size` values of a row has a scale s and a bias b, and each value is a whole number q of `bits` bits:
s * q + b. The numbers are in 32-bit words, the lowest bits first.

| array | dtype | shape |
|---|---|---|
| `weight` | uint32 | [..., out, in * bits / 32] |
| `scales`, `biases` | that of the weights before | [..., out, in / group_size] |

These are the names and the bits of folders of mlx-lm and of `mlx.nn.QuantizedLinear`, and a model that is saved has
them too: the metadata `icenet_quantization` of its file has the settings as config.json of mlx-lm has them.

Source: `mlx/backend/cpu/quantized.cpp` of MLX 0.32.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from icenet.core.errors import UsageError, WeightsError
from icenet.core.host.threads import for_ranges
from icenet.core.weights.arrays import Array, WeightsView
from icenet.core.weights.safetensors import Spec, spec_of

METADATA = "icenet_quantization"
BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)
"""What MLX computes with."""
DEFAULT_GROUP_SIZE = 64
KINDS = ("weight", "scales", "biases")
_CHUNK_VALUES = 1 << 18
"""Values that are computed together: as many as the caches of a core have room for."""
_MOST_THREADS = 8


class Quantization(NamedTuple):
    """How a layer is quantized."""

    bits: int
    group_size: int

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size}"

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the packed numbers for that of a weight."""
        return (*shape[:-1], shape[-1] * self.bits // 32)

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the scales for that of a weight."""
        return (*shape[:-1], shape[-1] // self.group_size)

    def shape(self, packed: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of a weight for that of its packed numbers."""
        return (*packed[:-1], packed[-1] * 32 // self.bits)


def check(bits: int, group_size: int) -> Quantization:
    """Returns the settings of a user.

    Raises:
        UsageError: MLX has no such number of bits or size of groups.
    """
    for name, value, allowed in (("bits", bits, BITS), ("group_size", group_size, GROUP_SIZES)):
        if isinstance(value, bool) or value not in allowed:
            raise UsageError(f"quantize: {name} {value!r} is not supported; one of {', '.join(map(str, allowed))}")
    return Quantization(bits, group_size)


def layers_to_quantize(
    shapes: Mapping[str, tuple[int, ...]], quantization: Quantization
) -> tuple[dict[str, Quantization], list[str]]:
    """Returns the layers of a model that are quantized, and those that are not because groups do not divide a row.

    Args:
        shapes: Shape of the weight of each layer that can be quantized, by path.
        quantization: The settings.

    Raises:
        UsageError: There are none.
    """
    divides = {path: shape[-1] % quantization.group_size == 0 for path, shape in shapes.items()}
    if not any(divides.values()):
        widths = sorted({shape[-1] for shape in shapes.values()})
        reason = f": the widths are {', '.join(map(str, widths[:4]))}" if widths else ""
        raise UsageError(
            f"quantize: no layer has a width that is a multiple of group_size {quantization.group_size}{reason}"
        )
    return dict.fromkeys((path for path in shapes if divides[path]), quantization), [
        path for path in shapes if not divides[path]
    ]


# ---- arrays ------------------------------------------------------------------------------------------------


def quantize(weight: Array, quantization: Quantization) -> tuple[Array, Array, Array]:
    """Returns packed numbers, scales and biases of a weight: the bits that `mlx.core.quantize` gives on a CPU.

    The end of a group's range with the larger absolute value, its edge, is a multiple of the scale, so it is exact.

    Args:
        weight: float32, float16 or bfloat16 `[..., out, in]`; `in` is a multiple of the size of a group.
        quantization: The settings.
    """
    bits, size = quantization
    groups = weight.reshape(-1, size)
    numbers = np.empty(groups.shape, np.uint8)
    scales, biases = (np.empty(len(groups), weight.dtype) for _ in range(2))
    largest, step = np.float32(2**bits - 1), max(1, _CHUNK_VALUES // size)

    def work(start: int, stop: int) -> None:
        for first in range(start, stop, step):
            part = slice(first, min(first + step, stop))
            values = groups[part].astype(np.float32)
            low, high = values.min(axis=1), values.max(axis=1)
            is_low = np.abs(low) > np.abs(high)
            scale = np.maximum((high - low) / largest, np.float32(1e-7))
            scale = np.where(is_low, scale, -scale)
            edge = np.where(is_low, low, high)
            steps = np.rint(edge / scale)
            is_exact = steps != 0
            scale = np.where(is_exact, edge / np.where(is_exact, steps, 1), scale)
            bias = np.where(is_exact, edge, np.float32(0))
            values -= bias[:, None]
            values /= scale[:, None]
            np.rint(values, out=values)
            numbers[part] = np.clip(values, 0, largest, out=values)
            scales[part], biases[part] = scale, bias

    with np.errstate(all="ignore"):  # the model's check of its logits reports values that are not finite
        for_ranges(work, len(groups), max(1, (1 << 20) // size), _MOST_THREADS)
    shape = quantization.scales_shape(weight.shape)
    return pack(numbers.reshape(weight.shape), bits), scales.reshape(shape), biases.reshape(shape)


def dequantize(
    parts: tuple[Array, Array, Array], quantization: Quantization, out: Array, rounds_products: bool = True
) -> None:
    """Writes the values of a weight: scale * q + bias, rounded to the dtype of `out`.

    Args:
        parts: Packed numbers, scales and biases.
        quantization: The settings.
        out: `[..., out, in]`, C-contiguous.
        rounds_products: Whether the product is rounded to the dtype of `out` before the bias is added, as
            `mlx.core.dequantize` does.
    """
    bits, size = quantization
    packed, scales, biases = (part.reshape(-1, part.shape[-1]) for part in parts)
    rows = out.reshape(-1, out.shape[-1])
    step = max(1, _CHUNK_VALUES // rows.shape[-1])

    def work(start: int, stop: int) -> None:
        for first in range(start, stop, step):
            part = slice(first, min(first + step, stop))
            groups = unpack(packed[part], bits).reshape(-1, rows.shape[-1] // size, size).astype(np.float32)
            groups *= scales[part, :, None].astype(np.float32)
            if rounds_products and rows.dtype != np.float32:
                groups = groups.astype(rows.dtype).astype(np.float32)
            groups += biases[part, :, None].astype(np.float32)
            rows[part] = groups.reshape(len(groups), -1)

    with np.errstate(all="ignore"):  # as in `quantize`
        for_ranges(work, len(rows), max(1, (1 << 20) // rows.shape[-1]), _MOST_THREADS)


def pack(values: Array, bits: int) -> Array:
    """Returns unsigned numbers of `bits` bits in 32-bit words; the inverse of `unpack`.

    Args:
        values: uint8 `[..., N]`, where N is a multiple of 32.
        bits: 2, 3, 4, 5, 6 or 8.

    Returns:
        uint32 `[..., N * bits // 32]`.
    """
    values = np.ascontiguousarray(values)
    if bits == 8:
        return values.view(np.uint32)
    if 8 % bits == 0:
        parts = values.reshape(*values.shape[:-1], -1, 8 // bits)
        found = parts[..., 0].copy()
        for index in range(1, 8 // bits):
            found |= parts[..., index] << np.uint8(index * bits)
        return found.view(np.uint32)
    groups = values.reshape(*values.shape[:-1], -1, 8).astype(np.uint64)  # 8 numbers in `bits` bytes
    words = groups[..., 0].copy()
    for index in range(1, 8):
        words |= groups[..., index] << np.uint64(index * bits)
    data = words.astype("<u8")[..., None].view(np.uint8)[..., :bits]
    return np.ascontiguousarray(data).reshape(*values.shape[:-1], -1).view(np.uint32)


def unpack(words: Array, bits: int) -> Array:
    """Returns the unsigned numbers of `bits` bits in 32-bit words, the lowest bits first.

    Args:
        words: 32-bit integers `[..., N]`.
        bits: 2, 3, 4, 5, 6 or 8.

    Returns:
        uint8 `[..., N * 32 // bits]`.
    """
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data
    mask = np.uint8(2**bits - 1)
    if 8 % bits == 0:
        parts = [(data >> np.uint8(shift)) & mask for shift in range(0, 8, bits)]
        return np.stack(parts, -1).reshape(*data.shape[:-1], -1)
    groups = data.reshape(*data.shape[:-1], -1, bits).astype(np.uint16)  # 8 numbers in `bits` bytes
    found = np.empty((*groups.shape[:-1], 8), np.uint8)
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        value = groups[..., byte] >> shift
        if shift + bits > 8:
            value = value | (groups[..., byte + 1] << (8 - shift))
        found[..., index] = value & mask
    return found.reshape(*data.shape[:-1], -1)


# ---- weights of a model ------------------------------------------------------------------------------------


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


# ---- settings ----------------------------------------------------------------------------------------------


def settings_of(layers: Mapping[str, Quantization]) -> dict[str, Any]:
    """Returns the settings of quantized layers as config.json of mlx-lm has them.

    The most common ones are those of all layers, and other layers have an entry of their own.
    """
    [(common, _)] = Counter(layers.values()).most_common(1)
    others = {path: found for path, found in layers.items() if found != common}
    return {
        "group_size": common.group_size,
        "bits": common.bits,
        "mode": "affine",
        **{path: {"group_size": found.group_size, "bits": found.bits} for path, found in others.items()},
    }


def metadata_of(layers: Mapping[str, Quantization]) -> dict[str, str]:
    """Returns the metadata of a file with quantized layers; empty without such layers."""
    return {METADATA: json.dumps(settings_of(layers), sort_keys=True)} if layers else {}


def stated_settings(metadata: Mapping[str, str], where: Any) -> dict[str, Any] | None:
    """Returns the settings that `metadata_of` recorded; None if nothing is.

    Raises:
        WeightsError: They are damaged.
    """
    if METADATA not in metadata:
        return None
    try:
        settings = json.loads(metadata[METADATA])
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise WeightsError(f"{where}: its metadata {METADATA} are damaged; copy or save the model again")
    return settings


def describe(layers: Mapping[str, Quantization]) -> str:
    """Returns the settings of quantized layers as a text: "197 layers have 4 bits in groups of 64"."""
    counts = Counter(layers.values())
    return ", ".join(
        f"{count} layer{'s have' if count > 1 else ' has'} {found}" for found, count in counts.most_common()
    )
