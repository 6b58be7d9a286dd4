"""Layers and functions of the MLX models, wherever the two frameworks differ in meaning.

Shapes: B batch, T positions, D width, H heads; of images H height, W width, C channels, O output channels.
The mirror is `icenet_torch/nn.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.core.errors import UsageError
from icenet.random import Dropout as Dropout

Array: TypeAlias = mx.array


_NATIVE_KINDS: dict[type, str] = {
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    nn.LayerNorm: "layer_norm",
    nn.RMSNorm: "rms_norm",
    nn.GroupNorm: "group_norm",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.BatchNorm: "batch_norm",
}


def kind_of(module: nn.Module) -> str | None:
    """The kind of a layer that holds parameters, ours or the framework's own (see `icenet.core.layout`)."""
    own: str | None = getattr(module, "layer_kind", None)
    known = own or next((kind for layer, kind in _NATIVE_KINDS.items() if isinstance(module, layer)), None)
    holds_arrays = any(isinstance(value, mx.array) and not name.startswith("_") for name, value in module.items())
    return known or ("plain" if holds_arrays else None)


def on_cpu() -> bool:
    """True where products in half precision are slow and are better done in fp32 (20x on x86)."""
    return mx.default_device().type == mx.DeviceType.cpu


def is_half(x: Array) -> bool:
    return x.dtype in (mx.float16, mx.bfloat16)


class Linear(nn.Linear):
    """x W^T + b in the dtype of x; the weights stay in theirs."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init_scale: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias)
        self.init_scale = init_scale

    def __call__(self, x: Array) -> Array:
        return linear(x, self.weight, self.get("bias"))


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x `[..., in]` times weight `[out, in]` transposed, plus bias `[out]`: `[..., out]` in x's dtype."""
    dtype = mx.float32 if is_half(x) and on_cpu() else x.dtype
    y, w = x.astype(dtype), weight.astype(x.dtype).astype(dtype).T
    if bias is None:
        return (y @ w).astype(x.dtype)
    b = bias.astype(x.dtype).astype(dtype)
    if not on_cpu():
        return mx.addmm(b, y, w).astype(x.dtype)
    # MLX's CPU adds a bias's gradient up term by term, 13 times less exactly than PyTorch at 8192 positions;
    # broadcast in two stages it is sqrt(N) sums of sqrt(N) terms
    positions = math.prod(x.shape[:-1])
    group = next((n for n in range(math.isqrt(positions), 0, -1) if positions % n == 0), 1)
    grouped = (y @ w).reshape(-1, group, b.shape[0]) + mx.broadcast_to(b, (positions // group, 1, b.shape[0]))
    return grouped.reshape(*x.shape[:-1], b.shape[0]).astype(x.dtype)


class Embedding(nn.Embedding):
    """Rows of a table: ids int `[...]` to `[..., D]`."""


class LayerNorm(nn.LayerNorm):
    """Layer norm (Ba et al., 2016) over the last axis, its statistics in fp32."""

    def __init__(self, dims: int, eps: float = 1e-5) -> None:
        super().__init__(dims, eps)

    def __call__(self, x: Array) -> Array:
        return mx.fast.layer_norm(x.astype(self.weight.dtype), self.weight, self.bias, self.eps).astype(x.dtype)


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


class BatchNorm2d(nn.BatchNorm):
    """Batch norm (Ioffe and Szegedy, 2015) of images `[B, H, W, C]`, its statistics in fp32.

    In training the running statistics move by a tenth towards the batch's mean and unbiased variance.
    """

    running_mean: Array
    running_var: Array

    def __init__(self, channels: int) -> None:
        super().__init__(channels)

    def __call__(self, x: Array) -> Array:
        y = x.astype(self.weight.dtype)
        if not self.training:
            scale = self.weight * mx.rsqrt(self.running_var + self.eps)
            y = _scale_and_shift(y - self.running_mean, scale, self.bias)  # type: ignore[assignment]
            return y.astype(x.dtype)
        count = y.size // y.shape[-1]
        check_batch_norm(count)
        mean, var = (mx.stop_gradient(moment) for moment in _moments(y))
        keep, m = 1 - self.momentum, self.momentum
        self.running_mean = keep * self.running_mean + m * mean
        self.running_var = keep * self.running_var + m * (var * (count / (count - 1)))
        y = _normalize(y, self.weight, self.bias, mean, mx.rsqrt(var + self.eps))  # type: ignore[assignment]
        return y.astype(x.dtype)


def _channel_sums(x: Array) -> Array:
    """Sums over all but the last axis, `[..., C]` to `[C]`.

    On a CPU they are taken in fp64, as PyTorch takes them; of many values but for the first eight, which makes them
    3 to 6 times more exact than the two stages of `linear` at about their cost. All in fp64 they would be up to
    three times as exact again, and a training step a tenth slower.
    """
    positions = x.size // x.shape[-1]
    if on_cpu():
        most = 8 if positions > 2048 else 1
        group = next(n for n in range(most, 0, -1) if positions % n == 0)
        sums = x.reshape(-1, group, x.shape[-1])
        sums = sums.sum(axis=1) if group > 1 else sums[:, 0]
        return sums.astype(mx.float64).sum(axis=0).astype(x.dtype)
    group = next(n for n in range(math.isqrt(positions), 0, -1) if positions % n == 0)
    return x.reshape(group, -1, x.shape[-1]).sum(axis=0).sum(axis=0)


def _moments(x: Array) -> tuple[Array, Array]:
    """Mean and biased variance of each channel, `[..., C]` to `[C]`; the mean is taken twice, as the loss's is."""
    share = x.shape[-1] / x.size
    rough = _channel_sums(x) * share
    rest = x - rough
    left = _channel_sums(rest) * share
    return rough + left, _channel_sums(mx.square(rest)) * share - mx.square(left)


@mx.custom_function
def _normalize(x: Array, weight: Array, bias: Array, mean: Array, scale: Array) -> Array:
    """weight (x - mean) scale + bias, where mean and scale = 1 / deviation are those of x's own channels."""
    return (x - mean) * (scale * weight) + bias


@_normalize.vjp
def _normalize_gradient(inputs: tuple[Array, ...], cotangent: Array, _: Array) -> tuple[Array, ...]:
    # written out: differentiating through mean and variance doubles the passes over the images
    x, weight, _, mean, scale = inputs
    normal = (x - mean) * scale
    bias_gradient, weight_gradient = _channel_sums(cotangent), _channel_sums(cotangent * normal)
    share = x.shape[-1] / x.size
    inner = cotangent - (bias_gradient + normal * weight_gradient) * share
    zeros = mx.zeros_like(mean)
    return inner * (weight * scale), weight_gradient, bias_gradient, zeros, zeros


@mx.custom_function
def _scale_and_shift(x: Array, scale: Array, shift: Array) -> Array:
    return x * scale + shift


@_scale_and_shift.vjp
def _scale_and_shift_gradient(inputs: tuple[Array, ...], cotangent: Array, _: Array) -> tuple[Array, ...]:
    x, scale, _ = inputs
    return cotangent * scale, _channel_sums(cotangent * x), _channel_sums(cotangent)


def check_batch_norm(count: int) -> None:
    """Refuses to take the variance of one value."""
    if count < 2:
        raise UsageError(
            "batch norm: one value in each channel has no variance to train with; "
            "use a larger training.batch_size, or larger images"
        )


def statistics(model: nn.Module) -> list[Array]:
    """The running means and variances of the batch norms within `model`."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm)]
    return [array for norm in norms for array in (norm.running_mean, norm.running_var)]


def set_statistics(model: nn.Module, values: list[Array]) -> None:
    """Puts back what `statistics` gave."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm)]
    for norm, mean, var in zip(norms, values[::2], values[1::2], strict=True):
        norm.running_mean, norm.running_var = mean, var


@contextlib.contextmanager
def keep_statistics(model: nn.Module) -> Iterator[None]:
    """While it is open, training leaves the running statistics of batch norms within `model` as they were."""
    before = statistics(model)
    try:
        yield
    finally:
        set_statistics(model, before)


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


def activation(name: str, x: Array) -> Array:
    """gelu (exact), gelu_tanh (its approximation), relu or silu, elementwise."""
    if name == "gelu":
        return nn.gelu(x)
    if name == "gelu_tanh":
        return nn.gelu_approx(x)
    if name == "silu":
        return nn.silu(x)
    return nn.relu(x)


def attention(q: Array, k: Array, v: Array, mask: str | Array | None) -> Array:
    """Scaled dot-product attention: softmax(q k^T / sqrt(D)) v, fused.

    q `[B, H, T, D]`, k and v `[B, H, S, D]` give `[B, H, T, D]`. The mask is None, "causal" (the last query
    sees the last key, also where T < S) or bool, True where a query may look, broadcast to `[B, H, T, S]`.
    """
    dtype = mx.float32 if is_half(q) and on_cpu() else q.dtype
    scale = q.shape[-1] ** -0.5
    out = mx.fast.scaled_dot_product_attention(
        q.astype(dtype), k.astype(dtype), v.astype(dtype), scale=scale, mask=mask
    )
    return out.astype(q.dtype)


def attention_pattern(visible: Array | None, length: int, causal: bool) -> str | Array | None:
    """The mask for `length` queries that stand at the end of the keys.

    `visible` is bool `[B, S]`, False for padding, or None where there is none. A padding query sees itself:
    a row without any key is zero in PyTorch and not a number in MLX, and nobody reads it.
    """
    if visible is None:
        return "causal" if causal else None
    keys = mx.arange(visible.shape[1])
    queries = keys[-length:, None]
    pattern = visible[:, None, None, :]
    if causal:
        pattern = pattern & (keys <= queries)
    return pattern | (keys == queries)


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """The mean cross-entropy in nats, fp32, and the number of labels counted.

    logits `[..., V]`; labels int `[...]`, where a negative label counts for nothing. The mean is taken twice,
    the second time of what is left over: a single sum of a thousand losses is off by several roundings.
    """
    counted = labels >= 0
    logits = logits.astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, mx.where(counted, labels, 0))
    count = counted.sum()
    share = counted / mx.maximum(count, 1)
    rough = mx.stop_gradient((losses * share).sum())
    return rough + ((losses - rough) * share).sum(), count


def gradient_norms(gradients: list[Array]) -> tuple[Array, Array]:
    """The Euclidean norm of all gradients together, and of each, `[N]`; fp32.

    Summed row by row first: one long sum in fp32 is off by 1e-5 over 1e7 values in MLX.
    """
    rows = [mx.square(gradient.astype(mx.float32)).sum(axis=-1) for gradient in gradients]
    squares = mx.stack([row.sum() for row in rows])
    return mx.sqrt(squares.sum()), mx.sqrt(squares)


def correct(logits: Array, labels: Array) -> Array:
    """How many rows of logits `[B, V]` are largest at their label."""
    return (logits.argmax(axis=-1) == labels).sum()


def checkpoint(block: nn.Module, *inputs: object) -> Any:
    """The block's output, its activations computed anew in the backward pass instead of kept.

    Running statistics move in the forward pass only.
    """
    passes = 0
    # a dropout without a key would draw another mask the second time: it is lent one
    unkeyed = [m for m in block.modules() if isinstance(m, Dropout) and m._keys is None and m.training and m.p > 0]
    keys = [mx.random.randint(0, 2**31 - 1, (1, 2)).astype(mx.uint32) for _ in unkeyed]

    def run(*arguments: object) -> Array:
        nonlocal passes
        passes += 1
        for module, key in zip(unkeyed, keys, strict=True):
            module._keys = key
        try:
            with contextlib.nullcontext() if passes == 1 else keep_statistics(block):
                return block(*arguments)
        finally:
            for module in unkeyed:
                module._keys = None

    return nn.utils.checkpoint(block, run)(*inputs)
