"""Layers with quantized weights, MLX: the format of `icenet.core.weights.quantization`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.core.errors import UsageError
from icenet.core.weights.quantization import BITS, DEFAULT_GROUP_SIZE, GROUP_SIZES, Quantization
from icenet.nn import linear_kernels
from icenet.nn.arrays import Array, on_cpu, product_dtype
from icenet.nn.embedding import Embedding

_FEW_ROWS = 8
"""Rows up to which MLX's product on a CPU is faster than dequantizing the weight first. (4096 x 4096, 4 bits: 17 ms
for one row and 1.1 s for 64, where dequantizing takes 0.1 s.)"""
_MOST_FEATURES = 16384
"""Inputs and outputs up to which MLX's CUDA build has a compiled product of one row. It compiles those of more rows
from CUTLASS when they are first used (`qmm_sm90` of 4 bits and bf16: 85 s). That product is not fast (2048 x 11264,
4 rows on an H200: 60 us, with a bf16 weight 29), so the weight is dequantized instead."""


class QuantizedLayer(nn.Module):
    """The arrays of a layer with a quantized weight. They are not trained.

    Attributes:
        weight: Packed numbers, uint32 `[..., out, in * bits / 32]`.
        scales, biases: `[..., out, in / group_size]`.
    """

    weight: Array
    scales: Array
    biases: Array
    bits: int
    group_size: int
    mode: str
    _generates = False  # whether there is no backward pass


_NATIVE: dict[type, type] = {
    nn.Linear: nn.QuantizedLinear,
    nn.Embedding: nn.QuantizedEmbedding,
    Embedding: nn.QuantizedEmbedding,
}
"""The quantized class of a layer of a user's model."""


def quantization_of(module: nn.Module) -> Quantization | None:
    """Returns how a layer is quantized, IceNet's or MLX's; None if it is not, or in another mode than affine."""
    if "scales" not in module or getattr(module, "mode", None) != "affine":
        return None
    return Quantization(module.bits, module.group_size)


def is_quantizable(module: nn.Module) -> bool:
    """Returns whether the weight of a layer can be quantized. Embeddings of users check their ids instead."""
    return getattr(module, "can_quantize", type(module) is nn.Linear)


def quantize_layers(modules: Iterable[tuple[str, nn.Module]], layers: Mapping[str, Quantization]) -> set[str]:
    """Makes layers of a model quantized ones, in place. Their values are undefined until they are set.

    Args:
        modules: All modules of the model, by path.
        layers: The settings of each layer, by path.

    Returns:
        The paths of the layers that are quantized. The others are of a class or have settings that MLX's products
        do not support.
    """
    changed = set()
    for path, module in modules:
        if (quantization := layers.get(path)) is None:
            continue
        if quantization_of(module) is not None:  # at a further path of a shared one
            changed.add(path)
            continue
        new = _quantized_type(module)
        if new is not None and quantization.bits in BITS and quantization.group_size in GROUP_SIZES:
            shape, dtype = module.weight.shape, module.weight.dtype
            scales, biases = (mx.zeros(quantization.scales_shape(shape), dtype) for _ in range(2))
            # the class alone changes, so that other references to the layer stay valid
            object.__setattr__(module, "__class__", new)
            _set_parts(module, mx.zeros(quantization.packed_shape(shape), mx.uint32), scales, biases, quantization)
            changed.add(path)
    return changed


def _quantized_type(module: nn.Module) -> Any:
    """Returns the class of a layer with a quantized weight; None if there is none."""
    if not getattr(module, "can_quantize", True):
        return None
    return getattr(module, "quantized_type", _NATIVE.get(type(module)))


def _set_parts(module: Any, weight: Array, scales: Array, biases: Array, quantization: Quantization) -> None:
    module.bits, module.group_size = quantization
    module.mode = "affine"
    module.weight, module.scales, module.biases = weight, scales, biases
    module.freeze()


def to_quantized(
    layer: Any, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **options: Any
) -> Any:
    """Returns a quantized copy of a layer, or the layer if it cannot be quantized: what `mlx.nn.quantize` calls.

    Raises:
        UsageError: The mode is not affine.
    """
    if not layer.can_quantize:
        return layer
    if mode != "affine" or any(options.values()):
        raise UsageError(f"quantize: mode {mode!r} is not supported, only 'affine'")
    quantization = Quantization(bits or 4, group_size or DEFAULT_GROUP_SIZE)
    found = copy.copy(layer)
    object.__setattr__(found, "__class__", layer.quantized_type)
    object.__setattr__(found, "_no_grad", set(layer._no_grad))
    _set_parts(found, *mx.quantize(layer.weight, quantization.group_size, quantization.bits), quantization)
    return found


def join_parts(layer: QuantizedLayer, originals: Sequence[QuantizedLayer]) -> None:
    """Makes the packed numbers, scales and biases of a layer parts of one array, where a kernel reads them.

    Each input of a kernel takes MLX 0.9 us of the host's time (H200), and a token of a small model that of the host.

    Args:
        layer: The layer, of the copy that generates.
        originals: The layers of the model whose rows it has, in their order. Their arrays become parts too, unless
            they have another dtype, so that the numbers are in memory once.
    """
    parts = [layer.weight, layer.scales, layer.biases]
    if linear_kernels.limits() is None or layer.scales.size * layer.scales.itemsize % 4:
        return
    joined = mx.concatenate([part.reshape(-1).view(mx.uint32) for part in parts])
    ends = list(itertools.accumulate(original.weight.shape[0] for original in originals[:-1]))
    start = 0
    for name, part in zip(("weight", "scales", "biases"), parts, strict=True):
        end = start + part.nbytes // 4
        found = joined[start:end].view(part.dtype).reshape(part.shape)
        rows = [found] if len(originals) == 1 else mx.split(found, ends)
        mx.eval(found, rows)
        layer[name], start = found, end
        for original, own in zip(originals, rows, strict=True):
            if original[name].dtype == own.dtype:
                original[name] = own
    layer["_packed_parts"] = joined


def quantized_product(x: Array, layer: QuantizedLayer) -> Array:
    """Computes x W^T: x `[..., in]` and the weight of a layer, `[out, in]`, to `[..., out]` in the dtype of x."""
    packed = linear_kernels.packed_weight(layer) if layer._generates else None
    if packed is not None and linear_kernels.can_compute(x, layer.weight, packed):
        return linear_kernels.fused_linear(x, layer.weight, packed=packed)
    dtype = product_dtype(x)
    y, scales, biases = x.astype(dtype), layer.scales.astype(dtype), layer.biases.astype(dtype)
    settings: dict[str, Any] = {"group_size": layer.group_size, "bits": layer.bits}
    if not _is_dequantized_first(x.size // x.shape[-1], x.shape[-1], layer.weight.shape[0]):
        return mx.quantized_matmul(y, layer.weight, scales, biases, transpose=True, **settings).astype(x.dtype)

    def product(y: Array, scales: Array, biases: Array) -> Array:
        return y @ mx.dequantize(layer.weight, scales, biases, **settings).T

    # a gradient dequantizes the weight again, so that a forward pass does not keep it
    compute = product if layer._generates else mx.checkpoint(product)
    return compute(y, scales, biases).astype(x.dtype)


def _is_dequantized_first(rows: int, inputs: int, outputs: int) -> bool:
    """Returns whether a product dequantizes the weight first, instead of MLX's product with packed numbers."""
    if on_cpu():
        return rows > _FEW_ROWS
    return bool(mx.cuda.is_available()) and (rows > 1 or max(inputs, outputs) > _MOST_FEATURES)
