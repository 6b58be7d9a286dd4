"""Convolution and pooling of images, MLX."""

from __future__ import annotations

import math
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.nn import exact, training_kernels
from icenet.nn.arrays import Array, cast_weight, is_half, on_cpu, product_dtype


class Conv2d(nn.Conv2d):
    """A convolution over images `[B, H, W, C]`, in the dtype of x.

    Args:
        inputs, outputs: Numbers of channels.
        kernel_size: Height and width of the kernel.
        stride: Stride of both axes.
        padding: Zeros at each edge; None is kernel_size // 2.
        bias: Whether the layer has a bias.
        init_scale: Factor of the weight's initial values (see `icenet.core.models.init`).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = False,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__(
            inputs, outputs, kernel_size, stride, padding=kernel_size // 2 if padding is None else padding, bias=bias
        )
        self.init_scale = init_scale

    def __call__(self, x: Array) -> Array:
        return conv2d(x, self.weight, self.stride[0], self.padding[0], self.get("bias"))


def conv2d(x: Array, weight: Array, stride: int, padding: int, bias: Array | None = None) -> Array:
    """Convolves images `[B, H, W, C]` with a weight `[O, K, K, C]` and adds a bias `[O]`.

    Returns:
        Images `[B, H', W', O]` in the dtype of x.
    """
    y, w = x.astype(product_dtype(x)), cast_weight(weight, x)
    if weight.shape[1] == 1 and padding == 0:
        # a product of matrices; MLX would copy the images into the columns of one
        pixels = y[:, ::stride, ::stride]
        rows: Any = _product(pixels.reshape(-1, x.shape[-1]), w.reshape(w.shape[0], -1))
        y = rows.reshape(*pixels.shape[:-1], -1)
    elif stride > 1 and on_cpu():
        y = _strided_on_cpu(y, w, stride, padding)
    elif training_kernels.has_kernels():
        y = _conv2d_on_cuda(y, w, stride, padding)
    else:
        y = mx.conv2d(y, w, stride, padding)
    if bias is not None:
        b = cast_weight(bias, x)
        y = exact.add_bias(y, b) if on_cpu() else y + b
    return y.astype(x.dtype)


@mx.custom_function
def _product(x: Array, weight: Array) -> Array:
    """Returns x W^T. MLX's own gradient of W is transposed, and would be copied for the norm and for Adam."""
    return x @ weight.T


@_product.vjp
def _product_gradient(inputs: tuple[Array, Array], cotangent: Array, _: Array) -> tuple[Array, Array]:
    x, weight = inputs
    return cotangent @ weight, cotangent.T @ x


def _conv2d_on_cuda(x: Array, weight: Array, stride: int, padding: int) -> Array:
    """Computes a convolution whose weight gradient is cuDNN's.

    MLX copies the images into K^2 times as many values and multiplies matrices. It has cuDNN's kernel for the
    gradient of a convolution with groups, which it recognizes by the strides of the two arrays.
    """

    @mx.custom_function
    def convolve(x: Array, weight: Array) -> Array:
        return mx.conv2d(x, weight, stride, padding)

    @convolve.vjp
    def gradient(inputs: tuple[Array, Array], cotangent: Array, _: Array) -> tuple[Array, Array]:
        x, weight = inputs
        kernel = weight.shape[1]
        # zeros at the end of each axis; fewer than none where the stride leaves pixels over
        after = [
            stride * (out - 1) - length + kernel - padding
            for length, out in zip(x.shape[1:3], cotangent.shape[1:3], strict=True)
        ]
        # MLX 0.32.4 keeps plans of cuDNN by the shapes, without the stride of a gradient. If it leaves no pixel
        # over, MLX may take the plan of a convolution with stride 1; one more pixel tells the two apart.
        pixel = [(0, 0), *((0, int(stride > 1 and more == padding)) for more in after), (0, 0)]
        [dx] = mx.vjp(lambda x: mx.conv2d(mx.pad(x, pixel), weight, stride, padding), [x], [cotangent])[1]
        height, width = (length + min(more, 0) for length, more in zip(x.shape[1:3], after, strict=True))
        d_weight = mx.conv_general(
            x[:, :height, :width].swapaxes(0, -1),
            cotangent.swapaxes(0, -1),
            padding=([padding, padding], [max(more, 0) for more in after]),
            kernel_dilation=stride,
        )
        return dx, d_weight.swapaxes(0, -1)

    return convolve(x, weight)  # type: ignore[return-value]  # MLX types the result as an object


def _strided_on_cpu(x: Array, weight: Array, stride: int, padding: int) -> Array:
    """Returns a strided convolution of MLX whose gradient is that of the same sums with stride 1.

    MLX's CPU computes the input gradient of a strided convolution in a slow loop: 895 ms for 32 images of 32x32x64
    and 128 outputs, where the forward pass takes 24 ms. With stride 1 it takes 33 ms, but the forward pass takes 2.5
    to 4 times as long as the strided one (3 x 3, 128 and 256 channels).
    """

    @mx.custom_function
    def convolve(x: Array, weight: Array) -> Array:
        return mx.conv2d(x, weight, stride, padding)

    @convolve.vjp
    def gradient(inputs: tuple[Array, Array], cotangent: Array, _: Array) -> list[Array]:
        return mx.vjp(lambda x, w: mx.conv2d(*_to_stride_1(x, w, stride, padding)), list(inputs), [cotangent])[1]

    return convolve(x, weight)  # type: ignore[return-value]  # MLX types the result as an object


def _to_stride_1(x: Array, weight: Array, stride: int, padding: int) -> tuple[Array, Array]:
    """Returns images and a weight whose convolution with stride 1 equals that of `x` and `weight` with `stride`.

    Cells of stride x stride pixels become one pixel with stride^2 times the channels (space to depth).
    """
    (batch, *size, channels), (outputs, kernel, *_) = x.shape, weight.shape
    edge = (padding, padding)
    if kernel == 1:
        return mx.pad(x, [(0, 0), edge, edge, (0, 0)])[:, ::stride, ::stride], weight
    cells = -(-kernel // stride)  # per kernel and axis; the kernel is filled up with zeros
    height, width = ((length + 2 * padding - kernel) // stride + cells for length in size)
    after = [max(stride * n - length - padding, 0) for n, length in zip((height, width), size, strict=True)]
    x = mx.pad(x, [(0, 0), (padding, after[0]), (padding, after[1]), (0, 0)])
    x = x[:, : stride * height, : stride * width]
    x = x.reshape(batch, height, stride, width, stride, channels).transpose(0, 1, 3, 2, 4, 5)
    fill = stride * cells - kernel
    weight = mx.pad(weight, [(0, 0), (0, fill), (0, fill), (0, 0)])
    weight = weight.reshape(outputs, cells, stride, cells, stride, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height, width, -1), weight.reshape(outputs, cells, cells, -1)


def max_pool(x: Array, size: int, stride: int, padding: int) -> Array:
    """Returns the maximum of each window of images.

    Among equal maxima (zeros after a ReLU) the first receives the gradient, as in PyTorch. MLX's own pooling divides
    the gradient among them.

    Args:
        x: `[B, H, W, C]`, of any floating dtype.
        size: Height and width of a window.
        stride: Distance of two windows, in both axes.
        padding: Pixels of -infinity at each edge.
    """
    if training_kernels.has_kernels():
        return training_kernels.max_pool(x, size, stride, padding)
    edge = (padding, padding)
    x = mx.pad(x, [(0, 0), edge, edge, (0, 0)], constant_values=mx.array(-math.inf, x.dtype))
    rows, columns = (stride * ((length - size) // stride) + 1 for length in x.shape[1:3])
    best = x[:, :rows:stride, :columns:stride]
    for i, j in [(i, j) for i in range(size) for j in range(size)][1:]:
        value = x[:, i : i + rows : stride, j : j + columns : stride]
        best = mx.where(value > best, value, best)
    return best


def global_average_pool(x: Array) -> Array:
    """Returns the mean over height and width, computed in fp32: `[B, H, W, C]` to `[B, C]` in the dtype of x."""
    y = x.astype(mx.float32) if is_half(x) else x
    return y.mean(axis=2).mean(axis=1).astype(x.dtype)  # in two stages, which keeps sums short and accurate


def flatten_pixels(x: Array) -> Array:
    """Returns images `[B, H, W, C]` as sequences of pixels, row by row: `[B, H * W, C]`."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def mean_of_patches(x: Array) -> Array:
    """Returns the mean of the patches of a square image, computed in fp32: `[B, N * N, D]` to `[B, D]`."""
    (batch, count, width), y = x.shape, x.astype(mx.float32) if is_half(x) else x
    rows = math.isqrt(count)
    return y.reshape(batch, rows, rows, width).mean(axis=2).mean(axis=1).astype(x.dtype)  # in two stages, as above
