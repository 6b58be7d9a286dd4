"""Normalization layers and their running statistics, MLX."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.core.config.transformer_plan import NormPlan
from icenet.core.nn.norm import check_batch_norm
from icenet.core.weights.layout import STATISTICS
from icenet.nn import exact, one_row, training_kernels
from icenet.nn.activations import activation as activate
from icenet.nn.arrays import Array, Dtype, is_half, on_cpu


class LayerNorm(nn.LayerNorm):
    """Layer normalization over the last axis (Ba et al., 2016), with statistics in fp32.

    y = (x - mean) / sqrt(variance + eps) * weight + bias: x `[..., D]` to `[..., D]`, in the dtype of x.

    Args:
        dims: D, the size of weight and bias.
        eps: Added to the variance.
    """

    def __init__(self, dims: int, eps: float = 1e-5) -> None:
        super().__init__(dims, eps)

    def __call__(self, x: Array) -> Array:
        row = self.get("_row")
        if row is not None and one_row.can_compute(x, row):
            return one_row.norm(x, row)
        weight, bias = self["weight"], self["bias"]  # an attribute takes ten times as long
        if x.dtype == weight.dtype == bias.dtype == mx.float32 and on_cpu():  # nothing is cast: generation on a CPU
            return mx.fast.layer_norm(x, weight, bias, self.eps)
        if _uses_kernel(x, weight):
            return training_kernels.layer_norm(x, weight, bias, self.eps)
        # on a CPU, MLX rounds half precision after each operation
        dtype = mx.float32 if is_half(weight) and on_cpu() else weight.dtype
        y, weight, bias = (array.astype(dtype) for array in (x, weight, bias))
        norm = _layer_norm if _has_wrong_gradient(y) else mx.fast.layer_norm
        return norm(y, weight, bias, self.eps).astype(x.dtype)

    def prepare_generation(self, original: LayerNorm, dtype: Dtype) -> None:
        """See `icenet.core.generation.copies`: prepares the norm of one row."""
        self._row = one_row.make_norm(original.weight, original.bias, self.eps)
        one_row.own_arrays(self, ("weight", "bias") if self._row else ())


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

    def __call__(self, x: Array) -> Array:
        row = self.get("_row")
        if row is not None and one_row.can_compute(x, row):
            return one_row.norm(x, row)
        if x.dtype == self.weight.dtype and not self.offset and not on_cpu():
            # its statistics are in fp32; it rounds before the product, too, as the models of transformers do
            return mx.fast.rms_norm(x, self.weight, self.eps)
        if _uses_kernel(x, self.weight):
            weight = 1 + self.weight if self.offset else self.weight
            return training_kernels.layer_norm(x, weight, None, self.eps)
        y = x.astype(mx.float32) if is_half(x) else x
        weight = self.weight.astype(y.dtype)
        weight = 1 + weight if self.offset else weight
        if on_cpu():  # the fused operation sums the gradient of the weight term by term there
            return exact.scale(mx.fast.rms_norm(y, None, self.eps), weight).astype(x.dtype)
        return mx.fast.rms_norm(y, weight, self.eps).astype(x.dtype)

    def prepare_generation(self, original: RMSNorm, dtype: Dtype) -> None:
        """See `icenet.core.generation.copies`: prepares the norm of one row."""
        weight = 1 + original.weight if self.offset else original.weight
        self._row = one_row.make_norm(weight, None, self.eps)
        one_row.own_arrays(self, ("weight",) if self._row else ())


def _has_wrong_gradient(x: Array) -> bool:
    """Returns whether the gradient of `mx.fast.layer_norm` is wrong: on CUDA, if 16 bytes do not divide a row.

    The kernel of MLX 0.32.4 (`layer_norm_vjp`) then reads values behind those that a thread holds.
    """
    return not on_cpu() and bool(mx.cuda.is_available()) and x.shape[-1] * x.itemsize % 16 != 0


def _layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Returns what `mx.fast.layer_norm` returns, of single operations."""
    y = x.astype(mx.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * mx.rsqrt(mx.square(y).mean(-1, keepdims=True) + eps)
    return (y * weight.astype(y.dtype) + bias.astype(y.dtype)).astype(x.dtype)


def _uses_kernel(x: Array, weight: Array) -> bool:
    """Returns whether a norm of half precision has the weight of training, fp32, and many values: on CUDA."""
    return is_half(x) and weight.dtype == mx.float32 and training_kernels.is_worthwhile(x)


def make_norm(plan: NormPlan, dims: int) -> LayerNorm | RMSNorm:
    """Returns a new normalization layer over the last axis.

    Args:
        plan: Kind of the layer and its eps.
        dims: Size of the last axis.
    """
    return RMSNorm(dims, plan.eps, plan.offset) if plan.kind == "rms_norm" else LayerNorm(dims, plan.eps)


class BatchNorm2d(nn.BatchNorm):
    """Batch normalization of images `[B, H, W, C]` (Ioffe and Szegedy, 2015), with statistics in fp32.

    In training, the running statistics move by a tenth towards the mean and the unbiased variance of the batch.
    A call takes what follows in a block, which one kernel computes together with the norm on CUDA: images to add to
    the result, and the name of an activation.

    Args:
        channels: C, the size of weight, bias and running statistics, which are fp32.
    """

    running_mean: Array
    running_var: Array

    def __init__(self, channels: int) -> None:
        super().__init__(channels)

    def __call__(self, x: Array, residual: Array | None = None, activation: str | None = None) -> Array:
        if self.training and training_kernels.has_kernels() and self.weight.dtype == mx.float32:
            check_batch_norm(x.size // x.shape[-1])
            statistics = self.running_mean, self.running_var
            relu = activation == "relu"
            y, self.running_mean, self.running_var = training_kernels.batch_norm(
                x, self.weight, self.bias, *statistics, self.eps, self.momentum, relu, residual
            )
            return y if relu or activation is None else activate(activation, y)
        y = self._normalize(x)
        y = y if residual is None else y + residual
        return y if activation is None else activate(activation, y)

    def _normalize(self, x: Array) -> Array:
        y = x.astype(mx.float32 if is_half(self.weight) else self.weight.dtype)
        if not self.training:
            weight, bias, mean, var = (
                array.astype(y.dtype) for array in (self.weight, self.bias, self.running_mean, self.running_var)
            )
            y = exact.scale_and_shift(y - mean, weight * mx.rsqrt(var + self.eps), bias)  # type: ignore[assignment]
            return y.astype(x.dtype)
        count = y.size // y.shape[-1]
        check_batch_norm(count)
        mean, var = (mx.stop_gradient(moment) for moment in exact.moments(y))
        keep, m = 1 - self.momentum, self.momentum
        self.running_mean = keep * self.running_mean + m * mean
        self.running_var = keep * self.running_var + m * (var * (count / (count - 1)))
        y = exact.normalize(y, self.weight, self.bias, mean, mx.rsqrt(var + self.eps))  # type: ignore[assignment]
        return y.astype(x.dtype)


def running_statistics(model: nn.Module) -> dict[str, Array]:
    """Returns the running means and variances of all modules in `model` that have them, by path."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in module.items()
        if name in STATISTICS and isinstance(value, mx.array)
    }


def set_running_statistics(model: nn.Module, values: Mapping[str, Array]) -> None:
    """Sets the running means and variances that `running_statistics` returned."""
    modules = dict(model.named_modules())
    for path, value in values.items():
        module, _, name = path.rpartition(".")
        setattr(modules[module], name, value)


@contextlib.contextmanager
def keep_buffers(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Restores the running statistics and the other frozen arrays of `model` on exit; a user's model may change them.

    Some changes, such as `self.count += 1`, are to the array itself, so copies take the place of the arrays
    meanwhile. An array that several modules share has one copy.

    Args:
        model: The model.
        modules: All of its modules, if they are known: to find those of a large model takes long. Default: found.
    """
    before = [
        (module, name, value)
        for module in (model.modules() if modules is None else modules)
        for name, value in module.items()
        if isinstance(value, mx.array) and (name in module._no_grad or name in STATISTICS)
    ]
    copies = {id(value): mx.array(value) for _, _, value in before}
    for module, name, value in before:
        setattr(module, name, copies[id(value)])
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
