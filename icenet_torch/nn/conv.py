"""Convolution and pooling of images, PyTorch."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import nn

from icenet_torch.nn.arrays import Array, cast_weight, is_half, product_dtype


class Conv2d(nn.Conv2d):
    """A convolution over images `[B, C, H, W]`, in the dtype of x.

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

    def reset_parameters(self) -> None:
        """Does nothing: initial values come from `icenet.core.models.init`."""

    def forward(self, x: Array) -> Array:
        return conv2d(x, self.weight, self.stride[0], int(self.padding[0]), self.bias)


def conv2d(x: Array, weight: Array, stride: int, padding: int, bias: Array | None = None) -> Array:
    """Convolves images `[B, C, H, W]` with a weight `[O, C, K, K]` and adds a bias `[O]`.

    Returns:
        Images `[B, O, H', W']` in the dtype of x.
    """
    y, w = x.to(product_dtype(x)), cast_weight(weight, x)
    if not x.is_cuda:
        # In channels_last, PyTorch 2.13's CPU code writes past its buffer in the weight gradient of a 1x1 convolution
        # with stride 2 (5 images of 10x10x12 to 6 channels). The process crashes much later.
        y, w = y.contiguous(), w.contiguous()
    return F.conv2d(y, w, None if bias is None else cast_weight(bias, x), stride, padding).to(x.dtype)


def max_pool(x: Array, size: int, stride: int, padding: int) -> Array:
    """Returns the maximum of each window of images. The first of equal maxima gets the gradient.

    Args:
        x: `[B, C, H, W]`, of any floating dtype.
        size: Height and width of a window.
        stride: Distance of two windows, in both axes.
        padding: Pixels of -infinity at each edge.
    """
    return F.max_pool2d(x, size, stride, padding)


def global_average_pool(x: Array) -> Array:
    """Returns the mean over height and width, computed in fp32: `[B, C, H, W]` to `[B, C]` in the dtype of x."""
    y = x.float() if is_half(x) else x
    return y.mean(dim=3).mean(dim=2).to(x.dtype)


def flatten_pixels(x: Array) -> Array:
    """Returns images `[B, C, H, W]` as sequences of pixels, row by row: `[B, H * W, C]`."""
    return x.flatten(2).transpose(1, 2)


def mean_of_patches(x: Array) -> Array:
    """Returns the mean of the patches of a square image, computed in fp32: `[B, N * N, D]` to `[B, D]`."""
    (batch, count, width), y = x.shape, x.float() if is_half(x) else x
    rows = math.isqrt(count)
    return y.reshape(batch, rows, rows, width).mean(dim=2).mean(dim=1).to(x.dtype)
