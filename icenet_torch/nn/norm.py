"""Normalization layers and their running statistics, PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from icenet.core.models.norm import check_batch_norm
from icenet_torch.nn.arrays import Array


class LayerNorm(nn.LayerNorm):
    """Layer normalization over the last axis (Ba et al., 2016), with statistics in fp32."""

    def __init__(self, dims: int, eps: float = 1e-5) -> None:
        super().__init__(dims, eps)

    def forward(self, x: Array) -> Array:
        y = F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.to(x.dtype)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalization of images `[B, C, H, W]` (Ioffe and Szegedy, 2015), with statistics in fp32.

    In training, the running statistics move by a tenth towards the mean and the unbiased variance of the batch.
    Unlike PyTorch's own layer it does not count batches.
    """

    momentum: float
    running_mean: Array
    running_var: Array

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Array) -> Array:
        y = x.to(self.weight.dtype)
        mean, var = self.running_mean, self.running_var
        if self.training:
            check_batch_norm(y.numel() // y.shape[1])
            # with momentum 1, PyTorch writes the batch's mean and unbiased variance into these buffers
            mean, var = torch.zeros_like(mean), torch.zeros_like(var)
        y = F.batch_norm(y, mean, var, self.weight, self.bias, self.training, 1.0, self.eps)
        if self.training:
            keep, m = 1 - self.momentum, self.momentum
            self.running_mean.copy_(keep * self.running_mean + m * mean)
            self.running_var.copy_(keep * self.running_var + m * var)
        return y.to(x.dtype)


def running_statistics(model: nn.Module) -> list[Array]:
    """Returns copies of the running means and variances of all batch norms in `model`."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return [tensor.clone() for norm in norms for tensor in (norm.running_mean, norm.running_var)]


@torch.no_grad()
def set_running_statistics(model: nn.Module, values: list[Array]) -> None:
    """Sets the running means and variances that `running_statistics` returned."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm, mean, var in zip(norms, values[::2], values[1::2], strict=True):
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


@contextlib.contextmanager
def keep_running_statistics(model: nn.Module) -> Iterator[None]:
    """Restores the running statistics of all batch norms in `model` on exit."""
    before = running_statistics(model)
    try:
        yield
    finally:
        set_running_statistics(model, before)
