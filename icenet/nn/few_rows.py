"""Linear layers with fused kernels, for captured steps of few rows, MLX.

MLX's CUDA build submits an operation in 8 to 10 us, and a product of several rows in 23, so that the number of
operations of a token decides. `icenet.nn.linear_kernels` computes a product with the operations around it in one. It
also reads packed weights, with which MLX's product is no faster than with bf16 ones.
"""

from __future__ import annotations

from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.nn import linear_kernels as kernels
from icenet.nn.activations import activation as activate
from icenet.nn.activations import gated_activation
from icenet.nn.arrays import Array
from icenet.nn.linear import Linear, Projections, QuantizedLinear, QuantizedProjections
from icenet.nn.norm import LayerNorm, RMSNorm


def has_few_rows(x: Array) -> bool:
    """Returns whether the kernel is used for an input, `[..., in]`: on CUDA and for few rows."""
    return x.size <= kernels.most_rows(x) * x.shape[-1] and kernels.limits() is not None


def product(
    layer: nn.Module,
    x: Array,
    norm: nn.Module | None = None,
    activation: str | None = None,
    residual: Array | None = None,
) -> Array:
    """Computes residual + activation(layer(norm(x))) for few rows.

    Other layers and norms than those of this package, such as a user's, are called.

    Args:
        layer: A linear layer, or `Projections`, whose outputs are side by side in the result.
        x: `[..., in]`.
        norm: The norm of x; None: x is used as it is.
        activation: See `icenet.nn.activation`; None: none.
        residual: `[..., out]`; None: nothing is added.

    Returns:
        `[..., out]` in the dtype of x.
    """
    if _can_fuse(layer, x, norm):
        return _fused(layer, x, norm, activation, False, residual)
    y: Any = layer(x if norm is None else norm(x))
    y = mx.concatenate(y, axis=-1) if isinstance(y, list) else y
    y = y if activation is None else activate(activation, y)
    return y if residual is None else residual + y


def gated_product(layer: nn.Module, x: Array, norm: nn.Module | None, activation: str) -> Array:
    """Computes activation(gate(norm(x))) * up(norm(x)) for few rows, where `layer` returns the gate and up."""
    if _can_fuse(layer, x, norm):
        return _fused(layer, x, norm, activation, True, None)
    gate, up = layer(x if norm is None else norm(x))
    return gated_activation(activation, gate, up)


def _can_fuse(layer: nn.Module, x: Array, norm: nn.Module | None) -> bool:
    """Returns whether the kernel computes a layer: one of these classes, with weights in the dtype of x or packed."""
    if type(layer) not in (Linear, Projections, QuantizedLinear, QuantizedProjections):
        return False
    return type(norm) in (LayerNorm, RMSNorm, type(None)) and kernels.can_compute(
        x, layer.weight, kernels.packed_weight(layer)
    )


def _fused(
    layer: nn.Module, x: Array, norm: nn.Module | None, activation: str | None, is_gated: bool, residual: Array | None
) -> Array:
    options, bias, packed = None, layer.get("bias"), kernels.packed_weight(layer)
    if norm is not None:
        kind = "layer" if isinstance(norm, LayerNorm) else "rms_offset" if norm.offset else "rms"
        vectors = _joined_vectors(layer, norm, x.dtype)
        options = kernels.Norm(kind, norm.weight, norm.get("bias"), norm.eps, vectors)
    return kernels.fused_linear(x, layer.weight, bias, options, activation, is_gated, residual, packed)


def _joined_vectors(layer: nn.Module, norm: nn.Module, dtype: mx.Dtype) -> Array | None:
    """Returns the bias of a layer and the vectors of its norm as one array; None if they are of another dtype.

    Each input of a kernel takes MLX 0.9 us of the host's time (H200). The layer, which is that of a copy that
    generates, keeps the array with the norm of which it is.
    """
    vectors = [vector for vector in (layer.get("bias"), norm.weight, norm.get("bias")) if vector is not None]
    if any(vector.dtype != dtype for vector in vectors):
        return None
    kept: list[Array] | None = layer.get("_vectors")
    if kept is None or kept[0] is not norm.weight:
        kept = [norm.weight, mx.concatenate(vectors)]
        mx.eval(kept)  # not in each captured step
        layer["_vectors"] = kept
    return kept[1]
