"""Convolutions and pooling of images, MLX."""

from __future__ import annotations

import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.nn.arrays import Array, is_half, on_cpu


class Conv2d(nn.Conv2d):
    """A convolution without bias over images `[B, H, W, C]`, padded by half its size, in the dtype of x."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel_size, stride, padding=kernel_size // 2, bias=False)

    def __call__(self, x: Array) -> Array:
        return conv2d(x, self.weight, self.stride[0], self.padding[0])


def conv2d(x: Array, weight: Array, stride: int, padding: int) -> Array:
    """Images `[B, H, W, C]` and weight `[O, K, K, C]` to images `[B, H', W', O]` in x's dtype."""
    dtype = mx.float32 if is_half(x) and on_cpu() else x.dtype
    y, w = x.astype(dtype), weight.astype(x.dtype).astype(dtype)
    if stride == 1 or not on_cpu():
        return mx.conv2d(y, w, stride, padding).astype(x.dtype)
    # The gradient for the input of a strided convolution is a plain loop in MLX's CPU code: 895 ms where the
    # forward pass takes 24 (32 images of 32x32x64 to 128 channels). The same sums as a convolution of stride 1
    # over cells of stride x stride pixels, their pixels laid out as channels, take 33 ms.
    return mx.conv2d(*_cells(y, w, stride, padding)).astype(x.dtype)


def _cells(x: Array, weight: Array, stride: int, padding: int) -> tuple[Array, Array]:
    """Images and weight whose convolution with stride 1 is that of `x` and `weight` with `stride`."""
    (batch, *size, channels), (outputs, kernel, *_) = x.shape, weight.shape
    if kernel == 1:
        return x[:, ::stride, ::stride], weight
    cells = -(-kernel // stride)  # of one kernel, along an axis; the kernel is filled up with zeros
    high, wide = ((length + 2 * padding - kernel) // stride + cells for length in size)
    after = [max(stride * n - length - padding, 0) for n, length in zip((high, wide), size, strict=True)]
    x = mx.pad(x, [(0, 0), (padding, after[0]), (padding, after[1]), (0, 0)])[:, : stride * high, : stride * wide]
    x = x.reshape(batch, high, stride, wide, stride, channels).transpose(0, 1, 3, 2, 4, 5)
    fill = stride * cells - kernel
    weight = mx.pad(weight, [(0, 0), (0, fill), (0, fill), (0, 0)])
    weight = weight.reshape(outputs, cells, stride, cells, stride, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, high, wide, -1), weight.reshape(outputs, cells, cells, -1)


def max_pool(x: Array, size: int, stride: int, padding: int) -> Array:
    """The largest value of each window of images `[B, H, W, C]`.

    Where several are the largest (zeros after a ReLU), the first takes the gradient, as in PyTorch; MLX's own
    pooling splits it.
    """
    edge = (padding, padding)
    x = mx.pad(x, [(0, 0), edge, edge, (0, 0)], constant_values=mx.array(-math.inf, x.dtype))
    rows, columns = (stride * ((length - size) // stride) + 1 for length in x.shape[1:3])
    best = x[:, :rows:stride, :columns:stride]
    for i, j in [(i, j) for i in range(size) for j in range(size)][1:]:
        value = x[:, i : i + rows : stride, j : j + columns : stride]
        best = mx.where(value > best, value, best)
    return best


def global_average_pool(x: Array) -> Array:
    """The mean over height and width, taken in fp32: `[B, H, W, C]` to `[B, C]` in x's dtype."""
    y = x.astype(mx.float32) if is_half(x) else x
    return y.mean(axis=2).mean(axis=1).astype(x.dtype)
