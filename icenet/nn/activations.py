"""Activation functions, MLX."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.core.nn.activation import check_activation
from icenet.core.nn.classes import change_classes
from icenet.nn import training_kernels
from icenet.nn.arrays import Array, is_half, on_cpu
from icenet.nn.exact import channel_sums


def activation(name: str, x: Array) -> Array:
    """Applies an activation elementwise.

    Args:
        name: gelu (exact), gelu_tanh (approximate), relu or silu.
        x: `[...]`, of any floating dtype.

    Returns:
        `[...]` in the dtype of x.

    Raises:
        UsageError: The name is unknown.
    """
    check_activation(name)
    if training_kernels.is_worthwhile(x):
        return training_kernels.activation(name, x)
    return _with_operations(name, x)


def _with_operations(name: str, x: Array) -> Array:
    if on_cpu():
        return _on_cpu(name, x)
    if name == "gelu":
        return nn.gelu(x)
    if name == "gelu_tanh":
        return nn.gelu_approx(x)
    if name == "silu":
        return nn.silu(x)
    return nn.relu(x)


def gated_activation(name: str, gate: Array, x: Array) -> Array:
    """Returns activation(gate) * x, in one kernel on a GPU.

    Args:
        name: As in `activation`.
        gate, x: `[...]`, of one shape and dtype, which the result has too.
    """
    return activation(name, gate) * x if on_cpu() else _compiled_gate(name)(gate, x)


@lru_cache
def _compiled_gate(name: str) -> Callable[[Array, Array], Array]:
    check_activation(name)
    compiled: Callable[[Array, Array], Array] = mx.compile(
        lambda gate, x: _with_operations(name, gate) * x, shapeless=True
    )
    return compiled


def _on_cpu(name: str, x: Array) -> Array:
    """Applies an activation in few operations, which are in fp32 for half precision: MLX rounds each of them.

    `mlx.nn` compiles its functions. On a CPU this starts g++ (0.8 s for each function) and gains nothing. The
    formulas are those of `mlx.nn`, but for gelu_tanh: 0.5 x (1 + tanh(u)) is x sigmoid(2 u), without a power and with
    fewer constants. A value takes 15 ns and not 22, with its gradient 17 and not 38; one of fp16 18 and not 52, and
    20 and not 108.
    """
    if name == "relu":
        return mx.maximum(x, 0)
    if is_half(x):
        return _on_cpu(name, x.astype(mx.float32)).astype(x.dtype)
    if name == "gelu":
        return x * (1 + mx.erf(x / math.sqrt(2))) / 2
    if name == "gelu_tanh":
        slope = 2 * math.sqrt(2 / math.pi)
        return x * mx.sigmoid(x * (slope + slope * 0.044715 * mx.square(x)))
    return x * mx.sigmoid(x)


# ---- MLX's own layers in a user's model --------------------------------------------------------------------
#
# At 0, where the zeros of an image or of a dropout layer are, PyTorch takes the derivative of the negative side. MLX
# takes 1 for a leaky ReLU, 1 + w for PReLU and 0 for CELU. The values are those of MLX, but for a leaky ReLU with a
# slope above 1: MLX takes the larger of x and slope * x.


class LeakyReLU(nn.LeakyReLU):
    """The class of MLX's own `LeakyReLU` after `match_gradients_at_zero`."""

    def __call__(self, x: Array) -> Array:
        return (_leaky_relu if on_cpu() else _compiled_leaky_relu)(x, self._negative_slope)


class PReLU(nn.PReLU):
    """The class of MLX's own `PReLU` after `match_gradients_at_zero`."""

    def __call__(self, x: Array) -> Array:
        return _prelu(x, self.weight)  # type: ignore[return-value]  # MLX types the result as an object


class CELU(nn.CELU):
    """The class of MLX's own `CELU` after `match_gradients_at_zero`."""

    def __call__(self, x: Array) -> Array:
        return (_celu if on_cpu() else _compiled_celu)(x, self._alpha)


_MATCHED: dict[type, type] = {nn.LeakyReLU: LeakyReLU, nn.PReLU: PReLU, nn.CELU: CELU}


def match_gradients_at_zero(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Gives MLX's own activations in a model PyTorch's gradient at 0, in place; subclasses of them stay.

    Args:
        modules: All modules of a model, by path.
    """
    change_classes(modules, _MATCHED)


def _leaky_relu(x: Array, slope: float) -> Array:
    return mx.where(x > 0, x, slope * x)


def _celu(x: Array, alpha: float) -> Array:
    negative = mx.where(x > 0, 0, x)  # exp overflows on the other side, and its gradient would be NaN
    return mx.where(x > 0, x, alpha * (mx.exp(negative / alpha) - 1))


@mx.custom_function
def _prelu(x: Array, weight: Array) -> Array:
    return mx.where(x > 0, x, weight * x)


@_prelu.vjp
def _prelu_gradient(inputs: tuple[Array, ...], cotangent: Array, _: Array) -> tuple[Array, ...]:
    x, weight = inputs
    own = mx.where(x > 0, cotangent, weight * cotangent)
    products = mx.where(x > 0, 0, cotangent * x).reshape(-1, weight.shape[0])
    return own.astype(x.dtype), channel_sums(products).astype(weight.dtype)


# compiled as those of `mlx.nn` are, but not on a CPU (see `_on_cpu`)
_compiled_leaky_relu: Callable[[Array, float], Array] = mx.compile(_leaky_relu, shapeless=True)
_compiled_celu: Callable[[Array, float], Array] = mx.compile(_celu, shapeless=True)
