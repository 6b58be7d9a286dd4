"""Layers with quantized weights, PyTorch. The mirror is `icenet/nn/quantized.py`.

PyTorch has a product with weights of 4 bits, for bf16. Other layers are dequantized when they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from icenet.core.weights.quantization import GROUP_SIZES, Quantization
from icenet_torch.nn.arrays import Array, product_dtype

_BITS = 4
_CHUNK_VALUES = 1 << 24
"""Values that are dequantized together: their words, numbers and products are in fp32."""
_OUTPUTS = 16
"""The number of outputs of a layer must be a multiple."""
_FEW_ROWS = 16
"""Rows up to which the product with 4 bits is used on CUDA. For more, the weight is dequantized first: reading it is
a small part of the time then, and the dense product is faster. On a CPU PyTorch's product is faster for 64 rows, too
(4096 x 4096: 140 ms, and 290 ms with a dense weight)."""


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
    _kernel: tuple[Array, Array] | None = None
    """The weight in the layout of PyTorch's product, for generation; None: it is dequantized for each product."""

    def prepare_product(self) -> None:
        """Makes the weight in the layout of PyTorch's product, in addition to that of the file."""
        self._kernel = _kernel_layout(self)


def quantization_of(module: nn.Module) -> Quantization | None:
    """Returns how a layer is quantized; None if it is not."""
    return Quantization(module.bits, module.group_size) if isinstance(module, QuantizedLayer) else None


def is_quantizable(module: nn.Module) -> bool:
    """Returns whether the weight of a layer can be quantized."""
    return getattr(module, "can_quantize", type(module) is nn.Linear)


def quantize_layers(modules: Iterable[tuple[str, nn.Module]], layers: Mapping[str, Quantization]) -> set[str]:
    """Makes layers of a model quantized ones, in place. Their values are undefined until they are set.

    Args:
        modules: All modules of the model, by path.
        layers: The settings of each layer, by path.

    Returns:
        The paths of the layers that are quantized. The others have a dtype, settings or sizes that PyTorch's product
        does not support.
    """
    changed = set()
    for path, module in modules:
        if (quantization := layers.get(path)) is None:
            continue
        if isinstance(module, QuantizedLayer):  # at a further path of a shared one
            changed.add(path)
        elif _is_supported(module, quantization):
            weight, new = module.weight, module.quantized_type
            del module._parameters["weight"]
            # the class alone changes, so that other references to the layer stay valid
            module.__class__ = new  # type: ignore[assignment]
            _set_parts(module, weight, quantization)
            changed.add(path)
    return changed


def _is_supported(module: Any, quantization: Quantization) -> bool:
    if not getattr(module, "can_quantize", False) or getattr(module, "quantized_type", None) is None:
        return False
    weight = module.weight
    if quantization.bits != _BITS or quantization.group_size not in GROUP_SIZES or weight.shape[0] % _OUTPUTS:
        return False
    return weight.is_meta or (weight.dtype == torch.bfloat16 and _has_product(str(weight.device)))


@lru_cache
def _has_product(device: str) -> bool:
    """Returns whether PyTorch's product with 4 bits works on a device: not on MPS, nor on old GPUs."""
    if torch.device(device).type not in ("cpu", "cuda"):
        return False
    layer = QuantizedLayer()
    _set_parts(layer, torch.empty(64, 64, dtype=torch.bfloat16, device=device), Quantization(_BITS, 32))
    numbers = torch.arange(64 * 8, device=device, dtype=torch.int32)
    layer.weight = (numbers * 73244475).reshape(64, 8).view(torch.uint32)
    layer.scales, layer.biases = torch.full_like(layer.scales, 0.25), torch.full_like(layer.biases, -2.0)
    x = torch.arange(64, device=device).sin()[None].to(torch.bfloat16)
    try:
        layer.prepare_product()
        found, expected = _product(x, layer).float(), F.linear(x.float(), dequantized(layer, torch.float32))
    except (RuntimeError, NotImplementedError):
        return False
    return bool((found - expected).abs().max() < 0.02 * expected.abs().max())


def _set_parts(module: Any, weight: Array, quantization: Quantization) -> None:
    """Gives a layer the arrays for a weight of some shape, dtype and device."""
    module.bits, module.group_size = quantization
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    shape, groups = tuple(weight.shape), quantization.scales_shape(tuple(weight.shape))
    packed = torch.empty(quantization.packed_shape(shape), dtype=torch.int32, device=weight.device)
    module.register_buffer("weight", packed.view(torch.uint32))
    for name in ("scales", "biases"):
        module.register_buffer(name, torch.empty(groups, dtype=weight.dtype, device=weight.device))


def quantized_product(x: Array, layer: QuantizedLayer) -> Array:
    """Computes x W^T: x `[..., in]` and the weight of a layer, `[out, in]`, to `[..., out]` in the dtype of x."""
    rows = x.numel() // x.shape[-1]
    if layer._kernel is not None and x.dtype == torch.bfloat16 and (not x.is_cuda or rows <= _FEW_ROWS):
        return _product(x.reshape(rows, -1), layer).reshape(*x.shape[:-1], -1)
    dtype = product_dtype(x)
    return F.linear(x.to(dtype), dequantized(layer, x.dtype).to(dtype)).to(x.dtype)


def dequantized(layer: QuantizedLayer, dtype: torch.dtype, rows: Array | None = None) -> Array:
    """Returns the weight of a layer, or some rows of it, in a dtype: s * q + b, computed in fp32.

    Args:
        layer: The layer.
        dtype: The dtype.
        rows: Indices of rows, int `[...]`.
    """
    parts = (layer.weight.view(torch.int32), layer.scales, layer.biases)
    if rows is not None:
        return _values([part[rows] for part in parts], layer.group_size).to(dtype)
    count, width = layer.weight.shape[0], layer.scales.shape[1] * layer.group_size
    found = torch.empty(count, width, dtype=dtype, device=layer.weight.device)
    step = max(1, _CHUNK_VALUES // width)
    for start in range(0, count, step):
        found[start : start + step] = _values([part[start : start + step] for part in parts], layer.group_size)
    return found


def _values(parts: Sequence[Array], group_size: int) -> Array:
    weight, scales, biases = parts
    numbers = _unpacked(weight).unflatten(-1, (-1, group_size))
    return (numbers * scales[..., None].float() + biases[..., None].float()).flatten(-2)


def _unpacked(words: Array) -> Array:
    """Returns the numbers of 4 bits in words, int32 `[..., N]` to `[..., 8 N]`."""
    shifts = torch.arange(0, 32, _BITS, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & (2**_BITS - 1)).flatten(-2)


def _kernel_layout(layer: QuantizedLayer) -> tuple[Array, Array]:
    """Returns the arguments of PyTorch's product, whose values are scale * (q - 8) + zero."""
    numbers, scales = _unpacked(layer.weight.view(torch.int32)), layer.scales.float()
    zeros = layer.biases.float() + 8 * scales
    pairs = torch.stack([scales, zeros], -1).transpose(0, 1).contiguous().to(torch.bfloat16)  # [groups, out, 2]
    if not numbers.is_cuda:
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 2), pairs
    pairs_of_numbers = (numbers[:, ::2] << 4 | numbers[:, 1::2]).to(torch.uint8)
    tiles = next(tiles for tiles in (8, 4, 2) if numbers.shape[1] % (16 * tiles) == 0)
    return torch.ops.aten._convert_weight_to_int4pack(pairs_of_numbers, tiles), pairs


def _product(x: Array, layer: QuantizedLayer) -> Array:
    """Computes x W^T with PyTorch's product: bf16 `[N, in]` to `[N, out]`."""
    assert layer._kernel is not None
    aten = torch.ops.aten
    product = aten._weight_int4pack_mm if x.is_cuda else aten._weight_int4pack_mm_for_cpu
    weight, pairs = layer._kernel
    return product(x, weight, layer.group_size, pairs)  # type: ignore[no-any-return]
