"""Linear layers with fused kernels, for captured steps of few rows, PyTorch.

For a token of GPT-2, a layer's norms, products, biases, activations and sums are ten kernels of about 4 us each on an
H200, of which reading the weights is a third. `icenet_torch.nn.linear_kernels` computes a product with the operations
around it in one kernel. MLX fuses elementwise operations with `mx.compile`.
"""

from __future__ import annotations

import torch
from torch import nn

from icenet_torch.nn.activations import activation as activate
from icenet_torch.nn.arrays import Array
from icenet_torch.nn.cached_attention import has_triton
from icenet_torch.nn.linear import Linear, Projections
from icenet_torch.nn.norm import LayerNorm, RMSNorm

MOST_ROWS = 2
"""Rows up to which the kernel is used. Tokens/s on an H200 in bf16, with it and without:

rows  GPT-2 124M         Llama 1.1B
1      3066 and  1704    1026 and  689
2      5228 and  3356    1653 and 1320
4      7573 and  6593    2452 and 2616
8      7503 and 12034
"""


def has_few_rows(x: Array) -> bool:
    """Returns whether the kernel is used for an input, `[..., in]`: on CUDA, with Triton and for few rows."""
    return x.is_cuda and x.numel() <= MOST_ROWS * x.shape[-1] and has_triton()


def product(
    layer: nn.Module,
    x: Array,
    norm: nn.Module | None = None,
    activation: str | None = None,
    residual: Array | None = None,
) -> Array:
    """Computes residual + activation(layer(norm(x))) for few rows.

    Other layers and norms than `Linear`, `LayerNorm` and `RMSNorm`, such as quantized ones, are called.

    Args:
        layer: A linear layer, or `Projections`, whose outputs are side by side in the result.
        x: `[..., in]`.
        norm: The norm of x; None: x is used as it is.
        activation: See `icenet_torch.nn.activation`; None: none.
        residual: `[..., out]`; None: nothing is added.

    Returns:
        `[..., out]` in the dtype of x.
    """
    if _can_fuse(layer, x, norm):
        return _fused(layer, x, norm, activation, False, residual)
    y = layer(x if norm is None else norm(x))
    y = torch.cat(y, dim=-1) if isinstance(y, tuple) else y
    y = y if activation is None else activate(activation, y)
    return y if residual is None else residual + y


def gated_product(layer: nn.Module, x: Array, norm: nn.Module | None, activation: str) -> Array:
    """Computes activation(gate(norm(x))) * up(norm(x)) for few rows, where `layer` returns the gate and up."""
    if _can_fuse(layer, x, norm):
        return _fused(layer, x, norm, activation, True, None)
    gate, up = layer(x if norm is None else norm(x))
    return activate(activation, gate) * up


def _can_fuse(layer: nn.Module, x: Array, norm: nn.Module | None) -> bool:
    """Returns whether the kernel computes a layer: one of these classes, without hooks, in the dtype of x."""
    if type(layer) not in (Linear, Projections) or type(norm) not in (LayerNorm, RMSNorm, type(None)):
        return False
    if not x.is_floating_point() or x.dtype == torch.float64 or layer.weight.dtype != x.dtype:
        return False
    return not any(m is not None and (m._forward_hooks or m._forward_pre_hooks) for m in (layer, norm))


def _fused(
    layer: nn.Module, x: Array, norm: nn.Module | None, activation: str | None, is_gated: bool, residual: Array | None
) -> Array:
    from icenet_torch.nn import linear_kernels as kernels

    options = None
    if norm is not None:
        kind = "layer" if isinstance(norm, LayerNorm) else "rms_offset" if norm.offset else "rms"
        options = kernels.Norm(kind, norm.weight, getattr(norm, "bias", None), norm.eps)
    y = kernels.fused_linear(
        x.reshape(-1, x.shape[-1]).contiguous(),
        layer.weight,
        layer.bias,
        options,
        activation,
        is_gated,
        None if residual is None else residual.contiguous(),
    )
    return y.reshape(*x.shape[:-1], -1)
