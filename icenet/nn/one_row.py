"""Linear layers and norms for one row of one token, `[1, 1, D]`, on a CPU in generation, MLX.

MLX starts each operation in its own thread and hands it to another one, which takes longer than most operations of a
small model; views are operations, too. So weights and biases have the axes of the row from the beginning, and a norm
is a few products. A token of a GPT-2 with 4 layers of 128 has 215 operations and not 360, and IceNet's speed is 1.00
of that of mlx-lm and not 0.73 (processor time, one thread of an AMD EPYC with AVX2).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.nn.arrays import Array, on_cpu


class Product(NamedTuple):
    """The operands of x W + b: `weight` is `[1, in, out]`, `bias` `[1, 1, out]` or None. They are views."""

    weight: Array
    bias: Array | None


class Norm(NamedTuple):
    """The operands of a norm of D values.

    Attributes:
        weight: `[1, 1, D]`.
        bias: `[1, 1, D]`; None: it is a root mean square norm.
        mean: 1 / D, `[1, 1, 1]`, the factor of the sum; None: nothing is subtracted.
        eps: `[1, 1, 1]`.
    """

    weight: Array
    bias: Array | None
    mean: Array | None
    eps: Array


def can_compute(x: Array, operands: Product | Norm | None) -> bool:
    """Returns whether a layer with these operands, if it has any, computes x as one row."""
    return operands is not None and x.dtype == mx.float32 and x.shape[:-1] == (1, 1)


def make_product(weight: Array, bias: Array | None) -> Product | None:
    """Returns the operands of a layer, weight `[out, in]` and bias `[out]`; None if they are not fp32 on a CPU."""
    if not on_cpu() or any(array.dtype != mx.float32 for array in (weight, bias) if array is not None):
        return None
    operands = Product(weight.T[None], None if bias is None else bias[None, None])
    mx.eval(operands)
    return operands


def make_norm(weight: Array, bias: Array | None, eps: float) -> Norm | None:
    """Returns the operands of a norm, weight and bias `[D]`; None if they are not fp32 on a CPU."""
    if not on_cpu() or any(array.dtype != mx.float32 for array in (weight, bias) if array is not None):
        return None
    size = weight.size
    mean = None if bias is None else mx.full((1, 1, 1), 1 / size)
    operands = Norm(weight[None, None], None if bias is None else bias[None, None], mean, mx.full((1, 1, 1), eps))
    mx.eval(operands)
    return operands


def own_arrays(layer: nn.Module, names: Iterable[str]) -> None:
    """Gives a layer of a copy array objects of its own, with the same memory.

    The copy of a model is made again when an array that it does not share changes in place (`snapshot.Snapshot`).
    Views of the array do not follow such a change.
    """
    for name in names:
        if name in layer:
            layer[name] = copy.copy(layer[name])


def product(x: Array, operands: Product) -> Array:
    """Computes x W + b, `[1, 1, in]` to `[1, 1, out]`: one operation. With operands of other axes it is five."""
    weight, bias = operands
    return x @ weight if bias is None else mx.addmm(bias, x, weight)


def norm(x: Array, operands: Norm) -> Array:
    """Computes (x - mean) / sqrt(variance + eps) * weight + bias, or without mean and bias, of x `[1, 1, D]`.

    A layer norm is 9 operations. `mx.fast.layer_norm` has no kernel on a CPU and is 18. The mean is a sum of MLX: the
    error of a product depends on the BLAS and was up to ten times as large for values far from 0.
    """
    weight, bias, mean, eps = operands
    centred = x if mean is None else x - mx.sum(x, -1, keepdims=True) * mean
    factor = mx.rsqrt(mx.addmm(eps, centred, centred.swapaxes(1, 2), alpha=1 / x.shape[-1]))
    scaled = centred * weight
    return scaled * factor if bias is None else mx.addmm(bias, factor, scaled)
