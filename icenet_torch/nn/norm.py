"""Normalization layers and their running statistics, PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from icenet.core.config.transformer_plan import NormPlan
from icenet.core.nn.norm import check_batch_norm
from icenet.core.weights.layout import LEFT_OUT, STATISTICS
from icenet_torch.nn.activations import activation as activate
from icenet_torch.nn.arrays import Array, is_half, on_cpu


class LayerNorm(nn.LayerNorm):
    """Layer normalization over the last axis (Ba et al., 2016), with statistics in fp32.

    y = (x - mean) / sqrt(variance + eps) * weight + bias: x `[..., D]` to `[..., D]`, in the dtype of x.

    Args:
        dims: D, the size of weight and bias.
        eps: Added to the variance.
    """

    def __init__(self, dims: int, eps: float = 1e-5) -> None:
        super().__init__(dims, eps)

    def forward(self, x: Array) -> Array:
        y = F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """Root mean square normalization over the last axis (Zhang and Sennrich, 2019), with statistics in fp32.

    y = x / sqrt(mean(x^2) + eps) * weight: x `[..., D]` to `[..., D]`, in the dtype of x.

    Args:
        dims: D, the size of the weight.
        eps: Added to the mean of the squares.
        offset: Multiply by 1 + weight, as in Gemma; the initial weight is zero.
    """

    def __init__(self, dims: int, eps: float = 1e-5, offset: bool = False) -> None:
        super().__init__(dims, eps)
        self.offset = offset
        self.init_scale = 0.0 if offset else 1.0

    def forward(self, x: Array) -> Array:
        if x.dtype == self.weight.dtype and not self.offset and not (is_half(x) and on_cpu(x)):
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)  # its statistics are in fp32
        y = x.float() if is_half(x) else x
        weight = self.weight.to(y.dtype)
        return F.rms_norm(y, self.normalized_shape, 1 + weight if self.offset else weight, self.eps).to(x.dtype)


def make_norm(plan: NormPlan, dims: int) -> LayerNorm | RMSNorm:
    """Returns a new normalization layer over the last axis.

    Args:
        plan: Kind of the layer and its eps.
        dims: Size of the last axis.
    """
    return RMSNorm(dims, plan.eps, plan.offset) if plan.kind == "rms_norm" else LayerNorm(dims, plan.eps)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalization of images `[B, C, H, W]` (Ioffe and Szegedy, 2015), with statistics in fp32.

    In training, the running statistics move by a tenth towards the mean and the unbiased variance of the batch.
    Unlike PyTorch's own layer it does not count batches. A call takes what follows in a block, as on MLX, where one
    kernel computes both: images to add to the result, and the name of an activation.

    Args:
        channels: C, the size of weight, bias and running statistics, which are fp32.
    """

    momentum: float
    running_mean: Array
    running_var: Array

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Array, residual: Array | None = None, activation: str | None = None) -> Array:
        y = self._normalize(x)
        y = y if residual is None else y + residual
        return y if activation is None else activate(activation, y)

    def _normalize(self, x: Array) -> Array:
        weight, bias, mean, var = self.weight, self.bias, self.running_mean, self.running_var
        if self.training:
            check_batch_norm(x.numel() // x.shape[1])
        if x.is_cuda and (x.dtype == weight.dtype or (is_half(x) and weight.dtype == torch.float32)):
            # PyTorch's kernels read and write half precision and compute in fp32, without copies of the images
            return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)
        y = x.to(torch.float32 if is_half(weight) else weight.dtype)
        weight, bias, mean, var = (array.to(y.dtype) for array in (weight, bias, mean, var))
        y = F.batch_norm(y, mean, var, weight, bias, self.training, self.momentum, self.eps)
        if self.training and mean is not self.running_mean:
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
        return y.to(x.dtype)


def running_statistics(model: nn.Module) -> dict[str, Array]:
    """Returns copies of the running means, variances and counters of all modules in `model` that have them, by path.

    PyTorch's own batch norm and instance norm also count batches.
    """
    return {path: tensor.clone() for path, tensor in _statistics(model).items()}


@torch.no_grad()
def set_running_statistics(model: nn.Module, values: Mapping[str, Array]) -> None:
    """Sets the running means, variances and counters that `running_statistics` returned."""
    buffers = _statistics(model)
    for path, value in values.items():
        buffers[path].copy_(value)


def _statistics(model: nn.Module) -> dict[str, Array]:
    names = STATISTICS | LEFT_OUT["batch_norm"]
    return {path: tensor for path, tensor in model.named_buffers() if path.rpartition(".")[2] in names}


@contextlib.contextmanager
def keep_buffers(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Restores the running statistics and the other buffers of `model` on exit; a user's model may change them.

    Some changes, such as `self.count += 1`, are to the tensor itself, so copies take the place of the buffers
    meanwhile. What is shared stays shared. The buffers are not written to, because autograd may have saved them.

    Args:
        model: The model.
        modules: All of its modules, if they are known: to find those of a large model takes long. Default: found.
    """
    before = [
        (module, name, buffer)
        for module in (model.modules() if modules is None else modules)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    copies = {id(buffer): buffer.clone() for _, _, buffer in before}
    for module, name, buffer in before:
        module._buffers[name] = copies[id(buffer)]
    try:
        yield
    finally:
        for module, name, buffer in before:
            module._buffers[name] = buffer
