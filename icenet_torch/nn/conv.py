"""Convolutions and pooling of images, PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from icenet_torch.nn.arrays import Array, is_half, on_cpu


class Conv2d(nn.Conv2d):
    """A convolution without bias over images `[B, C, H, W]`, padded by half its size, in the dtype of x."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel_size, stride, padding=kernel_size // 2, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: initial values come from `icenet.core.models.init`."""

    def forward(self, x: Array) -> Array:
        return conv2d(x, self.weight, self.stride[0], int(self.padding[0]))


def conv2d(x: Array, weight: Array, stride: int, padding: int) -> Array:
    """Images `[B, C, H, W]` and weight `[O, C, K, K]` to images `[B, O, H', W']` in x's dtype."""
    dtype = torch.float32 if is_half(x) and on_cpu(x) else x.dtype
    y, w = x.to(dtype), weight.to(x.dtype).to(dtype)
    if not x.is_cuda:
        # PyTorch 2.13's CPU code writes past its memory in the weight's gradient of a 1x1 convolution of stride 2
        # in the format channels_last (5 images of 10x10x12 to 6 channels), which crashes much later
        y, w = y.contiguous(), w.contiguous()
    return F.conv2d(y, w, None, stride, padding).to(x.dtype)


def max_pool(x: Array, size: int, stride: int, padding: int) -> Array:
    """The largest value of each window of images `[B, C, H, W]`; the first of several takes the gradient."""
    return F.max_pool2d(x, size, stride, padding)


def global_average_pool(x: Array) -> Array:
    """The mean over height and width, taken in fp32: `[B, C, H, W]` to `[B, C]` in x's dtype."""
    y = x.float() if is_half(x) else x
    return y.mean(dim=3).mean(dim=2).to(x.dtype)
