"""Quantized weights from values and back, with the bits of MLX (see `icenet.core.weights.quantization`).

Source: `mlx/backend/cpu/quantized.cpp` of MLX 0.32.
"""

from __future__ import annotations

import numpy as np

from icenet.core.host.threads import for_ranges
from icenet.core.weights.arrays import Array
from icenet.core.weights.quantization import Quantization

_CHUNK_VALUES = 1 << 18
"""Values that are computed together: as many as the caches of a core have room for."""
_MOST_THREADS = 8


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
