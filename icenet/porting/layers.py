"""Layers of MLX in a port that IceNet computes with its own operations, which are faster in training."""

from __future__ import annotations

import math
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.core.nn.classes import change_classes
from icenet.nn import exact, norm, training_kernels
from icenet.nn.activations import activation
from icenet.nn.arrays import Array, on_cpu
from icenet.nn.conv import conv2d, max_pool
from icenet.porting.convolution import convolve

# The source of a port has the layers of `mlx.nn`. These are their classes when IceNet runs the port. They compute the
# same; sizes and dtypes for which IceNet has nothing faster are left to MLX.


def accelerate(model: nn.Module) -> nn.Module:
    """Gives MLX's own layers in a port IceNet's operations, in place, and returns the model.

    On a CPU, MLX computes the gradients of strided convolutions and of max pooling in slow loops (see `nn.conv`), and
    so it does convolutions with groups or dilation (see `convolution`). On CUDA, its batch norm reads and writes the
    images many times (see `nn.training_kernels`).
    """
    change_classes(model.named_modules(), _ACCELERATED)
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Returns whether a model has layers that IceNet computes with its own operations."""
    return any(type(module) in _ACCELERATED.values() for _, module in model.named_modules())


class _ConvolutionOnCPU:
    """What the classes of MLX's own convolutions after `accelerate` share."""

    def __call__(self: Any, x: Array) -> Array:
        is_single = x.dtype == self.weight.dtype == mx.float32
        if not (on_cpu() and x.ndim == self.weight.ndim and is_single and x.size):
            return super().__call__(x)  # type: ignore[misc,no-any-return]
        rank = x.ndim - 2
        stride, padding, dilation = (
            (value,) * rank if isinstance(value, int) else tuple(value)
            for value in (self.stride, self.padding, self.dilation)
        )
        y = convolve(x, self.weight, stride, padding, dilation, getattr(self, "groups", 1))
        return exact.add_bias(y, self.bias) if "bias" in self else y


class Conv1d(_ConvolutionOnCPU, nn.Conv1d):
    """The class of MLX's own `Conv1d` after `accelerate`."""


class Conv2d(_ConvolutionOnCPU, nn.Conv2d):
    """The class of MLX's own `Conv2d` after `accelerate`."""

    def __call__(self, x: Array) -> Array:
        (kernel, width), (stride, stride_2), (padding, padding_2) = self.weight.shape[1:3], self.stride, self.padding
        is_square = kernel == width and stride == stride_2 and padding == padding_2
        is_plain = self.groups == 1 and self.dilation in (1, (1, 1)) and x.ndim == 4 and x.size > 0
        if not (is_square and is_plain and x.dtype == self.weight.dtype == mx.float32):
            return super().__call__(x)
        y = conv2d(x, self.weight, stride, padding)
        if "bias" not in self:
            return y
        return exact.add_bias(y, self.bias) if on_cpu() else y + self.bias


class Conv3d(_ConvolutionOnCPU, nn.Conv3d):
    """The class of MLX's own `Conv3d` after `accelerate`."""


class BatchNorm(nn.BatchNorm):
    """The class of MLX's own `BatchNorm` after `accelerate`."""

    _normalize = norm.BatchNorm2d._normalize

    def __call__(self, x: Array) -> Array:
        arrays = (self.get(name) for name in ("weight", "running_mean"))
        if x.ndim != 4 or any(array is None or array.dtype != mx.float32 for array in (x, *arrays)):
            return super().__call__(x)
        return norm.BatchNorm2d.__call__(self, x)  # type: ignore[arg-type]


class MaxPool2d(nn.MaxPool2d):
    """The class of MLX's own `MaxPool2d` after `accelerate`."""

    def __call__(self, x: Array) -> Array:
        (size, width), (stride, stride_2), (padding, padding_2) = self._kernel_size, self._stride, self._padding
        is_square = size == width and stride == stride_2 and padding == padding_2
        if not (is_square and x.ndim == 4 and x.dtype == mx.float32 and self.training):
            return super().__call__(x)
        return max_pool(x, size, stride, padding[0])


class ReLU(nn.ReLU):
    """The class of MLX's own `ReLU` after `accelerate`."""

    def __call__(self, x: Array) -> Array:
        return activation("relu", x) if training_kernels.is_worthwhile(x) else super().__call__(x)


class GELU(nn.GELU):
    """The class of MLX's own `GELU` after `accelerate`."""

    def __call__(self, x: Array) -> Array:
        is_approximate = self._approx in ("tanh", "precise")
        if self._approx != "fast" and training_kernels.is_worthwhile(x):
            return activation("gelu_tanh" if is_approximate else "gelu", x)
        if is_approximate and on_cpu():  # MLX takes a power, which is slow there
            return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))
        return super().__call__(x)


class SiLU(nn.SiLU):
    """The class of MLX's own `SiLU` after `accelerate`."""

    def __call__(self, x: Array) -> Array:
        return activation("silu", x) if training_kernels.is_worthwhile(x) else super().__call__(x)


_ACCELERATED: dict[type, type] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.BatchNorm: BatchNorm,
    nn.MaxPool2d: MaxPool2d,
    nn.ReLU: ReLU,
    nn.GELU: GELU,
    nn.SiLU: SiLU,
}
