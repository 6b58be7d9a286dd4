"""Functions that numpy computes for MLX on a Linux CPU.

On x86-64, MLX computes them one value at a time, which takes 6 to 15 ns. numpy uses vector instructions and takes 0.2
to 0.4 ns. It reads the memory of MLX's arrays. Products of matrices stay MLX's, so that one BLAS has the threads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np

from icenet.nn.arrays import Array, on_cpu

SMALLEST = 4096
"""Number of values from which on numpy is used. For fewer, it costs as much to wait for MLX as the function."""


def can_compute(*arrays: Array | None) -> bool:
    """Returns whether numpy can compute a function of these arrays, which are then evaluated.

    It can if all are fp32 or bool on a Linux CPU and have values. Inside `mx.compile` and `mx.vmap` they have none,
    and MLX's own operations must be used. Inside `mx.grad` and `mx.vjp` they have, and the function needs a gradient
    of its own (`mx.custom_function`).
    """
    given: Any = [array for array in arrays if array is not None]
    if sys.platform != "linux" or not on_cpu() or any(array.dtype not in (mx.float32, mx.bool_) for array in given):
        return False
    try:
        mx.eval(given)
    except ValueError:  # MLX has no function that tells whether it traces
        return False
    return True


def exp(x: Array) -> Array:
    """Returns e^x."""
    return _exp(x) if x.size >= SMALLEST and can_compute(x) else mx.exp(x)  # type: ignore[return-value]


def tanh(x: Array) -> Array:
    """Returns the hyperbolic tangent of x."""
    return _tanh(x) if x.size >= SMALLEST and can_compute(x) else mx.tanh(x)  # type: ignore[return-value]


def sigmoid(x: Array) -> Array:
    """Returns 1 / (1 + e^-x)."""
    return _sigmoid(x) if x.size >= SMALLEST and can_compute(x) else mx.sigmoid(x)  # type: ignore[return-value]


def _differentiable(function: Callable[[np.ndarray], np.ndarray], derivative: Callable[[Array], Array]) -> Any:
    """Returns a function of arrays with values that MLX can differentiate.

    Args:
        function: Computes the values with numpy.
        derivative: Computes the derivative from the values, with MLX, so that it can be differentiated, too.
    """

    def compute(x: Array) -> Array:
        with np.errstate(all="ignore"):  # MLX warns of nothing, and 1 / infinity is 0
            return mx.array(function(np.asarray(x)))

    call: Any = mx.custom_function(compute)
    call.vjp(lambda x, cotangent, y: cotangent * derivative(y))
    call.jvp(lambda x, tangent: tangent * derivative(call(x)))
    return call


def _logistic(x: np.ndarray) -> np.ndarray:
    y = np.exp(-x)
    y += 1
    return np.divide(1, y, out=y)


_exp = _differentiable(np.exp, lambda y: y)
_tanh = _differentiable(np.tanh, lambda y: 1 - y * y)
_sigmoid = _differentiable(_logistic, lambda y: y * (1 - y))
