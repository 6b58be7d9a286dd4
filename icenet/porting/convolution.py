"""Convolutions of a port on a CPU, where MLX computes those with groups, dilation or a stride in slow loops."""

from __future__ import annotations

import itertools
import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array

Sizes = tuple[int, ...]
"""A number for each spatial axis."""


def convolve(x: Array, weight: Array, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int = 1) -> Array:
    """Computes a convolution of images of any number of axes.

    Milliseconds forward and backward on one thread of a CPU, with MLX's own operation in brackets: 4 images of
    32 x 32 x 64 in 4 groups 10 to 20 (190), a depthwise one 4.5 (16); 4 images of 16 x 16 x 64 with a dilation of two
    4.6 (93); 8 sequences of 201 x 32 with a stride of two 0.8 (13).

    Args:
        x: `[B, ..., C]`.
        weight: `[O, ..., C / groups]`.
        stride, padding, dilation: Those of each spatial axis.
        groups: Number of groups of channels.

    Returns:
        `[B, ..., O]`.
    """
    if groups > 1 or math.prod(dilation) > 1:
        return _unfolded(x, weight, stride, padding, dilation, groups)
    if math.prod(stride) == 1:
        return mx.conv_general(x, weight, stride, padding)

    @mx.custom_function
    def compute(x: Array, weight: Array) -> Array:  # only the gradients of strides are slow
        return mx.conv_general(x, weight, stride, padding)

    @compute.vjp
    def gradient(inputs: tuple[Array, Array], cotangent: Array, _: Array) -> list[Array]:
        unfolded = lambda x, weight: [_unfolded(x, weight, stride, padding, dilation, 1)]  # noqa: E731
        return mx.vjp(unfolded, list(inputs), [cotangent])[1]

    return compute(x, weight)  # type: ignore[return-value]  # MLX types the result as an object


def _unfolded(x: Array, weight: Array, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int) -> Array:
    """Computes a convolution as one product of matrices for each group; a depthwise one as a sum over the kernel."""
    outputs, kernel, channels = weight.shape[0], weight.shape[1:-1], x.shape[-1]
    x = mx.pad(x, [(0, 0), *((edge, edge) for edge in padding), (0, 0)])
    sizes, slices = [], [[slice(None)]]
    for length, width, jump, step in zip(x.shape[1:-1], kernel, stride, dilation, strict=True):
        size = (length - step * (width - 1) - 1) // jump + 1
        starts = range(0, step * width, step)
        slices.append([slice(start, start + jump * (size - 1) + 1, jump) for start in starts])
        sizes.append(size)
    # what each value of a kernel is multiplied with
    seen = [x[places] for places in itertools.product(*slices)]
    if groups == channels == outputs:
        factors = weight.reshape(outputs, -1).T
        total = seen[0] * factors[0]
        for part, factor in zip(seen[1:], factors[1:], strict=True):
            total = total + part * factor
        return total
    parts = [part.reshape(-1, groups, channels // groups) for part in seen]
    columns = mx.stack(parts, axis=2).swapaxes(0, 1).reshape(groups, parts[0].shape[0], -1)
    y = columns @ weight.reshape(groups, outputs // groups, -1).swapaxes(1, 2)  # [groups, pixels, O / groups]
    return y.swapaxes(0, 1).reshape(x.shape[0], *sizes, outputs)
