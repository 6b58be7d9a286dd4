"""Layers and functions of the PyTorch models, wherever the two frameworks differ in meaning.

Shapes: B batch, T positions, D width, H heads; of images H height, W width, C channels, O output channels.
The mirror is `icenet/nn.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from icenet.core.errors import UsageError
from icenet_torch.random import Dropout as Dropout

Array: TypeAlias = Tensor


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
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.BatchNorm3d: "batch_norm",
}


def kind_of(module: nn.Module) -> str | None:
    """The kind of a layer that holds parameters, ours or the framework's own (see `icenet.core.layout`)."""
    own: str | None = getattr(module, "layer_kind", None)
    known = own or next((kind for layer, kind in _NATIVE_KINDS.items() if isinstance(module, layer)), None)
    holds_arrays = bool(module._parameters) or any(
        name not in module._non_persistent_buffers_set for name in module._buffers
    )
    return known or ("plain" if holds_arrays else None)


def on_cpu(x: Array) -> bool:
    """True where products in half precision are slow and are better done in fp32 (20x on x86)."""
    return x.device.type == "cpu"


def is_half(x: Array) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


class Linear(nn.Linear):
    """x W^T + b in the dtype of x; the weights stay in theirs."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init_scale: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias)
        self.init_scale = init_scale

    def reset_parameters(self) -> None:
        """Nothing: initial values come from `icenet.core.init`."""

    def forward(self, x: Array) -> Array:
        return linear(x, self.weight, self.bias)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x `[..., in]` times weight `[out, in]` transposed, plus bias `[out]`: `[..., out]` in x's dtype."""
    dtype = torch.float32 if is_half(x) and on_cpu(x) else x.dtype
    y, w = x.to(dtype), weight.to(x.dtype).to(dtype)
    y = F.linear(y, w, None if bias is None else bias.to(x.dtype).to(dtype))
    return y.to(x.dtype)


class Embedding(nn.Embedding):
    """Rows of a table: ids int `[...]` to `[..., D]`."""

    def reset_parameters(self) -> None:
        """Nothing: initial values come from `icenet.core.init`."""


class LayerNorm(nn.LayerNorm):
    """Layer norm (Ba et al., 2016) over the last axis, its statistics in fp32."""

    def __init__(self, dims: int, eps: float = 1e-5) -> None:
        super().__init__(dims, eps)

    def forward(self, x: Array) -> Array:
        return F.layer_norm(
            x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps
        ).to(x.dtype)


def to_channels_first(x: Array) -> Array:
    """Images `[B, H, W, C]` as PyTorch's models take them, `[B, C, H, W]`.

    On CUDA a view, which is the memory format channels_last. Elsewhere a copy: on MPS batch norm's gradient is
    wrong for images that are not contiguous, and for the CPU see `conv2d`.
    """
    x = x.permute(0, 3, 1, 2)
    return x if x.is_cuda else x.contiguous()


class Conv2d(nn.Conv2d):
    """A convolution without bias over images `[B, C, H, W]`, padded by half its size, in the dtype of x."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel_size, stride, padding=kernel_size // 2, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: initial values come from `icenet.core.init`."""

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


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm (Ioffe and Szegedy, 2015) of images `[B, C, H, W]`, its statistics in fp32.

    In training the running statistics move by a tenth towards the batch's mean and unbiased variance. Unlike
    PyTorch's own it counts no batches.
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
            # with momentum 1 PyTorch leaves the batch's own mean and unbiased variance in what it is given
            mean, var = torch.zeros_like(mean), torch.zeros_like(var)
        y = F.batch_norm(y, mean, var, self.weight, self.bias, self.training, 1.0, self.eps)
        if self.training:
            keep, m = 1 - self.momentum, self.momentum
            self.running_mean.copy_(keep * self.running_mean + m * mean)
            self.running_var.copy_(keep * self.running_var + m * var)
        return y.to(x.dtype)


def check_batch_norm(count: int) -> None:
    """Refuses to take the variance of one value."""
    if count < 2:
        raise UsageError(
            "batch norm: one value in each channel has no variance to train with; "
            "use a larger training.batch_size, or larger images"
        )


def statistics(model: nn.Module) -> list[Array]:
    """The running means and variances of the batch norms within `model`, copied."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return [tensor.clone() for norm in norms for tensor in (norm.running_mean, norm.running_var)]


@torch.no_grad()
def set_statistics(model: nn.Module, values: list[Array]) -> None:
    """Puts back what `statistics` gave."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm, mean, var in zip(norms, values[::2], values[1::2], strict=True):
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


@contextlib.contextmanager
def keep_statistics(model: nn.Module) -> Iterator[None]:
    """While it is open, training leaves the running statistics of batch norms within `model` as they were."""
    before = statistics(model)
    try:
        yield
    finally:
        set_statistics(model, before)


def max_pool(x: Array, size: int, stride: int, padding: int) -> Array:
    """The largest value of each window of images `[B, C, H, W]`; the first of several takes the gradient."""
    return F.max_pool2d(x, size, stride, padding)


def global_average_pool(x: Array) -> Array:
    """The mean over height and width, taken in fp32: `[B, C, H, W]` to `[B, C]` in x's dtype."""
    y = x.float() if is_half(x) else x
    return y.mean(dim=3).mean(dim=2).to(x.dtype)


def activation(name: str, x: Array) -> Array:
    """gelu (exact), gelu_tanh (its approximation), relu or silu, elementwise."""
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "silu":
        return F.silu(x)
    return F.relu(x)


def attention(q: Array, k: Array, v: Array, mask: str | Array | None) -> Array:
    """Scaled dot-product attention: softmax(q k^T / sqrt(D)) v, fused.

    q `[B, H, T, D]`, k and v `[B, H, S, D]` give `[B, H, T, D]`. The mask is None, "causal" (the last query
    sees the last key, also where T < S) or bool, True where a query may look, broadcast to `[B, H, T, S]`.
    """
    dtype = torch.float32 if is_half(q) and on_cpu(q) else q.dtype
    queries, keys = q.shape[-2], k.shape[-2]
    causal = isinstance(mask, str) and queries == keys
    if isinstance(mask, str):
        # PyTorch's is_causal lets the first query see the first key only: spell the mask out where T < S
        positions = torch.arange(keys, device=q.device)
        mask = None if causal or queries == 1 else positions <= positions[-queries:, None]
    out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, is_causal=causal)
    return out.to(q.dtype)


def attention_pattern(visible: Array | None, length: int, causal: bool) -> str | Array | None:
    """The mask for `length` queries that stand at the end of the keys.

    `visible` is bool `[B, S]`, False for padding, or None where there is none. A padding query sees itself:
    a row without any key is zero in PyTorch and not a number in MLX, and nobody reads it.
    """
    if visible is None:
        return "causal" if causal else None
    keys = torch.arange(visible.shape[1], device=visible.device)
    queries = keys[-length:, None]
    pattern = visible[:, None, None, :]
    if causal:
        pattern = pattern & (keys <= queries)
    return pattern | (keys == queries)


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """The mean cross-entropy in nats, fp32 (fp64 of fp64 logits), and the number of labels counted.

    logits `[..., V]`; labels int `[...]`, where a negative label counts for nothing. The mean is taken twice,
    the second time of what is left over: a single sum of a thousand losses is off by several roundings.
    """
    counted = (labels >= 0).flatten()
    logits = logits.float() if is_half(logits) else logits
    if logits.is_cuda:  # which sums by halves: nothing is left over, and a small step is bound by its kernels' number
        count, wanted = counted.sum(), torch.where(counted, labels.flatten(), -100).long()
        return F.cross_entropy(logits.flatten(0, -2), wanted, reduction="sum") / count.clamp(min=1), count
    losses = F.cross_entropy(
        logits.flatten(0, -2), torch.where(counted, labels.flatten(), 0).long(), reduction="none"
    )
    count = counted.sum()
    share = counted.to(losses.dtype) / count.clamp(min=1)
    rough = (losses * share).sum().detach()
    return rough + ((losses - rough) * share).sum(), count


def gradient_norms(gradients: list[Array]) -> tuple[Array, Array]:
    """The Euclidean norm of all gradients together, and of each, `[N]`; fp32 (fp64 of a reference)."""
    norms = torch.stack(torch._foreach_norm(gradients))  # as torch.nn.utils.get_total_norm does
    return torch.linalg.vector_norm(norms), norms


def correct(logits: Array, labels: Array) -> Array:
    """How many rows of logits `[B, V]` are largest at their label."""
    return (logits.argmax(dim=-1) == labels).sum()


def checkpoint(block: nn.Module, *inputs: object) -> Any:
    """The block's output, its activations computed anew in the backward pass instead of kept.

    Running statistics move in the forward pass only.
    """
    # a dropout without a key draws from PyTorch's generator, whose state is put back for the second time
    unkeyed = any(isinstance(m, Dropout) and m._keys is None and m.training and m.p > 0 for m in block.modules())
    return torch.utils.checkpoint.checkpoint(
        block,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=unkeyed,
        context_fn=lambda: (contextlib.nullcontext(), keep_statistics(block)),
    )
