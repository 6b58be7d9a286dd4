"""The loops over time of `icenet.nn.recurrence.loops` on a Linux CPU, where numpy computes the gates.

On x86-64, MLX computes tanh one value at a time, which takes 8 to 14 ns. numpy uses vector instructions and takes 0.2
to 0.4 ns. It reads the memory of MLX's arrays. Products of matrices are those of MLX's BLAS, which has the threads.

Each function computes the same as the loop of its name there, and returns the records joined over the steps. A step
has one product, and functions of small arrays that stay in the cache of a core.

Shapes: T steps, B rows, H hidden_size, G gates. Arguments and results are MLX arrays in fp32, masks bool `[T, B, 1]`.
"""

from __future__ import annotations

import os
import sys
from typing import Any, TypeAlias

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np

from icenet.nn.arrays import Array, on_cpu
from icenet.nn.recurrence.products import Product

Arrays: TypeAlias = tuple[Any, ...]

# MLX has no warnings of overflows either; `icenet.core.training` finds losses that are not finite
_without_warnings = np.errstate(over="ignore", invalid="ignore")


def is_used(projected: Array, *others: Array | None) -> bool:
    """Returns whether these functions compute a layer: several steps, unless ICENET_RECURRENT_KERNELS is "off"."""
    is_off = os.environ.get("ICENET_RECURRENT_KERNELS") == "off"
    return not is_off and len(projected) > 1 and projected.size > 0 and _has_values(projected, *others)


def _has_values(*arrays: Array | None) -> bool:
    """Returns whether numpy can read arrays, which are then evaluated: fp32 or bool, on a Linux CPU.

    Inside `mx.compile` and `mx.vmap` arrays have no values. Inside `mx.grad` and `mx.vjp` they have.
    """
    given: Any = [array for array in arrays if array is not None]
    if sys.platform != "linux" or not on_cpu() or any(array.dtype not in (mx.float32, mx.bool_) for array in given):
        return False
    try:
        mx.eval(given)
    except ValueError:  # MLX has no function that tells whether it traces
        return False
    return True


@_without_warnings
def lstm_forward(
    projected: Array, weight: Array, h: Array, c: Array, mask: Array | None, record: bool = True
) -> Arrays:
    """Returns h after each step `[T, B, H]` and the last c `[B, H]`; then the records: c, tanh(c) and the gates."""
    inputs, h, c, seen = (_numpy(array) for array in (projected, h, c, mask))
    steps, rows, width = inputs.shape
    gates = np.empty(inputs.shape, np.float32)
    each = _by_gate(gates, 4)
    hs, cs, tanh_cs = (np.empty((steps, rows, width // 4), np.float32) for _ in range(3))
    # sigmoid(a) = tanh(a / 2) / 2 + 1 / 2, so one call of tanh computes all four gates
    scale = np.repeat(np.array([0.5, 0.5, 1.0, 0.5], np.float32), width // 4)
    product = _product(weight, rows, transposed=True)
    for step in range(steps):
        gates[step] = inputs[step]
        product.add_to(gates[step], h)
        gates[step] *= scale
        np.tanh(gates[step], out=gates[step])
        gates[step] *= scale
        gates[step] += 1 - scale
        i, f, g, o = each[step]  # [B, H] each
        cs[step] = _where(seen, step, f * c + i * g, c)
        c = cs[step]
        np.tanh(c, out=tanh_cs[step])
        hs[step] = _where(seen, step, o * tanh_cs[step], h)
        h = hs[step]
    results = mx.array(hs), mx.array(c)
    return (*results, mx.array(cs), mx.array(tanh_cs), mx.array(gates)) if record else results


@_without_warnings
def lstm_backward(inputs: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    """Returns the gradients of `projected`, the first h and the first c."""
    _, weight, _, first, mask = inputs
    _, _, cs, tanh_cs, gates = (_numpy(array) for array in outputs)
    d_hs, dc, c0, seen = (_numpy(array) for array in (*cotangents[:2], first, mask))
    each = _by_gate(gates, 4)
    d_gates = np.empty(gates.shape, np.float32)
    d_each = _by_gate(d_gates, 4)
    product = _product(weight, len(c0), transposed=False)
    dh = np.zeros(c0.shape, np.float32)
    for step in reversed(range(len(gates))):
        i, f, g, o = each[step]
        d_i, d_f, d_g, d_o = d_each[step]
        tanh_c = tanh_cs[step]
        dh += d_hs[step]
        d_state = dc + dh * o * (1 - tanh_c * tanh_c)
        d_i[:] = d_state * g * i * (1 - i)
        d_f[:] = d_state * (cs[step - 1] if step else c0) * f * (1 - f)
        d_g[:] = d_state * i * (1 - g * g)
        d_o[:] = dh * tanh_c * o * (1 - o)
        _clear_padding(seen, step, d_gates[step])
        _keep_padding(seen, step, dh)
        product.add_to(dh, d_gates[step])
        dc = _where(seen, step, d_state * f, dc)
    return mx.array(d_gates), mx.array(dh), mx.array(dc)


@_without_warnings
def gru_forward(
    projected: Array, weight: Array, bias_hn: Array, h: Array, mask: Array | None, record: bool = True
) -> Arrays:
    """Returns h after each step `[T, B, H]`; then the records: r and z, n, the contribution of the state to n."""
    inputs, bias, h, seen = (_numpy(array) for array in (projected, bias_hn, h, mask))
    steps, rows, _ = inputs.shape
    hidden = h.shape[1]
    gates = np.empty((steps, rows, 2 * hidden), np.float32)
    each = _by_gate(gates, 2)
    hs, candidates, recurrent = (np.empty((steps, rows, hidden), np.float32) for _ in range(3))
    product, products = _product(weight, rows, transposed=True), np.empty((rows, 3 * hidden), np.float32)
    for step in range(steps):
        products[:] = 0
        product.add_to(products, h)
        np.add(inputs[step, :, : 2 * hidden], products[:, : 2 * hidden], out=gates[step])
        gates[step] *= 0.5  # sigmoid, as in the LSTM
        np.tanh(gates[step], out=gates[step])
        gates[step] *= 0.5
        gates[step] += 0.5
        r, z = each[step]  # [B, H] each
        np.add(products[:, 2 * hidden :], bias, out=recurrent[step])
        n = np.tanh(inputs[step, :, 2 * hidden :] + r * recurrent[step], out=candidates[step])
        hs[step] = _where(seen, step, n + z * (h - n), h)
        h = hs[step]
    records = (gates, candidates, recurrent) if record else ()
    return tuple(mx.array(array) for array in (hs, *records))


@_without_warnings
def gru_backward(inputs: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    """Returns the gradients of `projected`, of the recurrent products `[T, B, 3H]` and of the first h."""
    _, weight, _, first, mask = inputs
    hs, gates, candidates, recurrent = (_numpy(array) for array in outputs)
    d_hs, h0, seen = (_numpy(array) for array in (cotangents[0], first, mask))
    hidden = h0.shape[1]
    each = _by_gate(gates, 2)
    d_projected, d_recurrent = (np.empty((*hs.shape[:2], 3 * hidden), np.float32) for _ in range(2))
    d_each = _by_gate(d_recurrent, 3)
    product = _product(weight, len(h0), transposed=False)
    dh = np.zeros(h0.shape, np.float32)
    for step in reversed(range(len(hs))):
        r, z = each[step]
        d_r, d_z, d_n = d_each[step]
        n = candidates[step]
        dh += d_hs[step]
        d_candidate = dh * (1 - z) * (1 - n * n)
        d_r[:] = d_candidate * recurrent[step] * r * (1 - r)
        d_z[:] = dh * ((hs[step - 1] if step else h0) - n) * z * (1 - z)
        d_n[:] = d_candidate * r
        _clear_padding(seen, step, d_recurrent[step])
        d_projected[step, :, : 2 * hidden] = d_recurrent[step, :, : 2 * hidden]
        d_projected[step, :, 2 * hidden :] = _where(seen, step, d_candidate, 0)
        dh = _where(seen, step, dh * z, dh)
        product.add_to(dh, d_recurrent[step])
    return mx.array(d_projected), mx.array(d_recurrent), mx.array(dh)


@_without_warnings
def rnn_forward(
    relu: bool, projected: Array, weight: Array, h: Array, mask: Array | None, record: bool = True
) -> Arrays:
    """Returns h after each step `[T, B, H]`. There are no records."""
    inputs, h, seen = (_numpy(array) for array in (projected, h, mask))
    hs = np.empty(inputs.shape, np.float32)
    product, new = _product(weight, len(h), transposed=True), np.empty(h.shape, np.float32)
    for step in range(len(hs)):
        new[:] = inputs[step]
        product.add_to(new, h)
        hs[step] = _where(seen, step, np.maximum(new, 0) if relu else np.tanh(new), h)
        h = hs[step]
    return (mx.array(hs),)


@_without_warnings
def rnn_backward(relu: bool, inputs: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    """Returns the gradients of `projected` and of the first h."""
    _, weight, first, mask = inputs
    hs, d_hs, seen = (_numpy(array) for array in (outputs[0], cotangents[0], mask))
    d_gates = np.empty(hs.shape, np.float32)
    product = _product(weight, len(first), transposed=False)
    dh = np.zeros(first.shape, np.float32)
    for step in reversed(range(len(hs))):
        dh += d_hs[step]
        d_gates[step] = dh * ((hs[step] > 0) if relu else 1 - hs[step] * hs[step])
        _clear_padding(seen, step, d_gates[step])
        _keep_padding(seen, step, dh)
        product.add_to(dh, d_gates[step])
    return mx.array(d_gates), mx.array(dh)


def _numpy(array: Array | None) -> Any:
    """Returns the memory of an array, which is evaluated; None for None."""
    return None if array is None else np.asarray(array)


def _product(weight: Array, rows: int, transposed: bool) -> Product:
    """Returns the product of rows with a weight of MLX (see `Product`)."""
    return Product(_numpy(weight), rows, transposed)


def _by_gate(gates: np.ndarray, count: int) -> np.ndarray:
    """Returns a view `[T, G, B, H]` of gates `[T, B, G*H]`."""
    steps, rows, width = gates.shape
    return gates.reshape(steps, rows, count, width // count).swapaxes(1, 2)


def _where(seen: np.ndarray | None, step: int, value: Any, padding: Any) -> Any:
    """Returns `value` where there is no padding in a step, and `padding` elsewhere."""
    return value if seen is None else np.where(seen[step], value, padding)


def _keep_padding(seen: np.ndarray | None, step: int, gradient: np.ndarray) -> None:
    """Sets the gradients `[B, n]` of all but padding in a step to zero, in place."""
    np.copyto(gradient, 0, where=True if seen is None else seen[step])


def _clear_padding(seen: np.ndarray | None, step: int, gradient: np.ndarray) -> None:
    """Sets the gradients `[B, n]` of padding in a step to zero, in place."""
    if seen is not None:
        np.copyto(gradient, 0, where=~seen[step])
