"""The loops over time of recurrent layers, and their gradients, MLX: LSTM, GRU and the simple RNN.

On CUDA, kernels run all steps in one launch (`icenet.nn.recurrence.kernels`). On a Linux CPU, numpy computes the
gates (`icenet.nn.recurrence.host`). The loops serve Metal and compiled functions, are the reference of both, and
compute gradients of gradients.

The gradients of these loops are written out. Automatic differentiation would compute the gradient of the recurrent
weights once per step and add the steps. Here it is one product over all steps, as in PyTorch's kernels, which takes
half the time on a CPU and is more accurate. Factors that do not depend on the gradient of later steps are computed
for all steps at once, before the loop.

Shapes: T steps, B rows, H hidden_size, G gates. Time is the first axis. `projected` `[T, B, G*H]` is the contribution
of the inputs to the gates; `weight` `[G*H, H]` has the dtype of products; h and c `[B, H]` are the state before the
first step; `mask` is bool `[T, B, 1]` or None.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.nn.recurrence import host, kernels

Arrays: TypeAlias = tuple[Any, ...]
Activation: TypeAlias = Callable[[mx.array], mx.array]


def with_gradient(
    forward: Callable[..., Any], backward: Callable[..., Arrays], fused: kernels.Fused, on_host: kernels.Fused
) -> Callable[..., Any]:
    """Combines a loop over time and its gradient into one differentiable function, called with `training=`.

    `forward(*inputs)` returns results and records. Records are lists with one array per step that
    `backward(inputs, cotangents, (*results, *records))` needs. They are kept in training only, because this costs up
    to a quarter of the time. A gradient in evaluation mode runs the forward pass again. The last input is the mask.

    `fused` computes the same with kernels, where `kernels.are_used` chooses them, and `on_host` with numpy, where
    `host.is_used` does. Gradients of gradients and derivatives of forward mode are always those of the loops.
    """

    def keep(*inputs: Any) -> Arrays:
        results, records = forward(*inputs)
        return *results, *(mx.stack(record) for record in records)

    def drop(*inputs: Any) -> Arrays:
        return tuple(forward(*inputs)[0])

    def first(mask: mx.array | None, count: int) -> Callable[..., list[mx.array]]:
        """The gradient as a function of `count` inputs and the cotangents. The records depend on the inputs."""

        def compute(*arrays: mx.array) -> list[mx.array]:
            inputs = *arrays[:count], mask
            return list(backward(inputs, arrays[count:], keep(*inputs))[:-1])

        return compute

    def second(primals: Any, cotangents: Any, _: Any) -> Arrays:
        """The gradient of `gradient`."""
        (*floats, mask), given, outputs = primals
        count = len(floats)
        found: Any = mx.vjp(first(mask, count), [*floats, *given], list(cotangents))[1]
        return (*found[:count], mask), (*found[count:],), tuple(mx.zeros_like(array) for array in outputs)

    def push_forward(primals: Any, tangents: Any) -> Arrays:
        """The derivative of forward mode of `gradient`."""
        (*floats, mask), given, _ = primals
        return derivative(first(mask, len(floats)), [*floats, *given], [*tangents[0][:-1], *tangents[1]])

    def derivative(function: Any, primals: list[mx.array], tangents: Any) -> Arrays:
        moved = [mx.zeros_like(a) if t is None else t for a, t in zip(primals, tangents, strict=True)]
        return tuple(mx.jvp(lambda *arrays: list(function(*arrays)), primals, moved)[1])

    def derivative_of(loop: Any) -> Any:
        """The derivative of forward mode of `keep` or `drop`."""
        return lambda primals, tangents: derivative(
            lambda *floats: loop(*floats, primals[-1]), list(primals[:-1]), tangents[:-1]
        )

    own = keep, drop

    def pair(keep: Any, drop: Any, backward: Any) -> tuple[Any, Any]:
        def floats(inputs: Arrays, given: Arrays, outputs: Arrays) -> Arrays:
            return tuple(backward(inputs, given, outputs)[:-1])  # without the mask

        gradient: Any = mx.custom_function(floats)
        gradient.vjp(second)
        gradient.jvp(push_forward)
        kept, dropped = mx.custom_function(keep), mx.custom_function(drop)
        for function, loop in zip((kept, dropped), own, strict=True):
            function.jvp(derivative_of(loop))
        kept.vjp(lambda inputs, given, outputs: (*gradient(inputs, given, outputs), inputs[-1]))
        # `second` has the derivatives of what is kept, and MLX's kernels have none
        dropped.vjp(
            lambda inputs, given, _: (*gradient(inputs, given, [*map(mx.stop_gradient, keep(*inputs))]), inputs[-1])
        )
        return kept, dropped

    loops = pair(keep, drop, backward)
    launches, numpy_loops = (
        pair(partial(one.forward, record=True), partial(one.forward, record=False), one.backward)
        for one in (fused, on_host)
    )

    def scan(*inputs: Any, training: bool) -> Arrays:
        kept, dropped = loops
        if kernels.are_used(*inputs[:2]):
            kept, dropped = launches
        elif host.is_used(*inputs):
            kept, dropped = numpy_loops
        results: Arrays = (kept if training else dropped)(*inputs)
        return results

    return scan


def lstm_forward(projected: mx.array, weight: mx.array, h: mx.array, c: mx.array, mask: mx.array | None) -> Arrays:
    """Returns h after each step `[T, B, H]` and the last c `[B, H]`; records c, tanh(c) and the gates."""
    # sigmoid(a) = tanh(a / 2) / 2 + 1 / 2, so one call of tanh computes all four gates
    half, one = mx.full(h.shape, 0.5), mx.ones(h.shape)
    scale = mx.concatenate([half, half, one, half], axis=-1)
    shift = mx.concatenate([half, half, one * 0, half], axis=-1)
    weight = weight.T  # [H, 4H]
    hs, cs, tanh_cs, gates = [], [], [], []
    for step in range(len(projected)):
        step_mask = None if mask is None else mask[step]
        gates.append(mx.tanh(add_matmul(projected[step], h, weight) * scale) * scale + shift)
        i, f, g, o = mx.split(gates[-1], 4, axis=-1)  # [B, H] each
        c = where(step_mask, f * c + i * g, c)
        tanh_cs.append(mx.tanh(c))
        h = where(step_mask, o * tanh_cs[-1], h)
        cs.append(c)
        hs.append(h)
    return (mx.stack(hs), c), (cs, tanh_cs, gates)


def lstm_backward(inputs: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    projected, weight, h0, c0, mask = inputs
    hs, _, cs, tanh_c, gates = outputs
    i, f, g, o = mx.split(gates, 4, axis=-1)  # [T, B, H] each
    # The gradients of the gates before their activations are [dc, dc, dc, dh] * through, where dc includes
    # dh * through_c.
    inner = [g * i * (1 - i), states_before(c0, cs) * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)]
    through = where(mask, mx.concatenate(inner, axis=-1), 0)
    through_c = where(mask, o * (1 - tanh_c * tanh_c), 0)
    carried_c = where(mask, f, 1)
    dh, dc = mx.zeros_like(h0), cotangents[1]
    d_gates = []
    for step in reversed(range(len(projected))):
        dh = dh + cotangents[0][step]
        dc = dc + dh * through_c[step]
        d_gates.append(mx.concatenate([dc, dc, dc, dh], axis=-1) * through[step])
        dh = add_matmul(padding_gradient(mask, dh, step), d_gates[-1], weight)
        dc = dc * carried_c[step]
    d_projected = mx.stack(d_gates[::-1])
    return d_projected, weight_gradient(d_projected, states_before(h0, hs), weight), dh, dc, mask


def lstm_fused(projected: mx.array, weight: mx.array, *state: Any, record: bool) -> Arrays:
    """Computes `lstm_forward`, with the records joined, by kernels."""
    h, c, mask = state
    found = kernels.forward("lstm", projected, weight, (h, c), mask, record=record)
    cs = found["cs"]
    return (found["hs"], cs[-1], cs, found["tanh_cs"], found["gates"]) if record else (found["hs"], cs)


def lstm_fused_backward(inputs: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    _, weight, h0, c0, mask = inputs
    records = dict(zip(("hs", "", "cs", "tanh_cs", "gates"), outputs, strict=True))
    found = kernels.backward("lstm", weight, (h0, c0), mask, records, *cotangents[:2])
    d_gates = found["d_gates"]
    dh = add_matmul(None if mask is None else found["carried_h"], d_gates[0], weight)
    d_weight = weight_gradient(d_gates, states_before(h0, records["hs"]), weight)
    return d_gates, d_weight, dh, found["carried_c"], mask


def lstm_host_backward(inputs: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    _, weight, h0, _, mask = inputs
    d_gates, dh, dc = host.lstm_backward(inputs, cotangents, outputs)
    return d_gates, weight_gradient(d_gates, states_before(h0, outputs[0]), weight), dh, dc, mask


lstm_scan = with_gradient(
    lstm_forward,
    lstm_backward,
    kernels.Fused(lstm_fused, lstm_fused_backward),
    kernels.Fused(host.lstm_forward, lstm_host_backward),
)


def gru_forward(
    projected: mx.array, weight: mx.array, bias_hn: mx.array, h: mx.array, mask: mx.array | None
) -> Arrays:
    """Returns h after each step `[T, B, H]`; records r and z, n, and the contribution of the state to n."""
    before_n = [2 * h.shape[-1]]  # the split between the gates r, z and n
    projected_rz, projected_n = mx.split(projected, before_n, axis=-1)
    bias = mx.concatenate([mx.zeros(before_n, bias_hn.dtype), bias_hn])  # [3H]
    weight = weight.T  # [H, 3H]
    hs, gates, candidates, recurrent = [], [], [], []
    for step in range(len(projected)):
        recurrent_rz, recurrent_n = mx.split(add_matmul(bias, h, weight), before_n, axis=-1)
        gates.append(mx.sigmoid(projected_rz[step] + recurrent_rz))
        r, z = mx.split(gates[-1], 2, axis=-1)  # [B, H] each
        n = mx.tanh(projected_n[step] + r * recurrent_n)
        h = where(None if mask is None else mask[step], n + z * (h - n), h)
        candidates.append(n)
        recurrent.append(recurrent_n)
        hs.append(h)
    return (mx.stack(hs),), (gates, candidates, recurrent)


def gru_backward(inputs: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    projected, weight, _, h0, mask = inputs
    hs, gates, n, recurrent_n = outputs
    r, z = mx.split(gates, 2, axis=-1)  # [T, B, H] each
    # dh times these factors is the gradient of n and z before their activations, and of the recurrent products
    through_n = where(mask, (1 - z) * (1 - n * n), 0)
    through_z = where(mask, (states_before(h0, hs) - n) * z * (1 - z), 0)
    through = mx.concatenate([through_n * recurrent_n * r * (1 - r), through_z, through_n * r], axis=-1)
    carried = where(mask, z, 1)
    dh = mx.zeros_like(h0)
    d_hs, d_recurrent = [], []
    for step in reversed(range(len(projected))):
        dh = dh + cotangents[0][step]
        d_hs.append(dh)
        d_recurrent.append(mx.concatenate([dh, dh, dh], axis=-1) * through[step])
        dh = add_matmul(dh * carried[step], d_recurrent[-1], weight)
    d_all = mx.stack(d_recurrent[::-1])  # [T, B, 3H]
    d_rz, d_recurrent_n = mx.split(d_all, [2 * h0.shape[-1]], axis=-1)
    d_projected = mx.concatenate([d_rz, mx.stack(d_hs[::-1]) * through_n], axis=-1)
    d_bias = d_recurrent_n.sum(axis=1).sum(axis=0)  # in two stages: MLX's CPU adds a long sum term by term
    return d_projected, weight_gradient(d_all, states_before(h0, hs), weight), d_bias, dh, mask


def gru_fused(projected: mx.array, weight: mx.array, *state: Any, record: bool) -> Arrays:
    """Computes `gru_forward`, with the records joined, by kernels."""
    bias, h, mask = state
    found = kernels.forward("gru", projected, weight, (h,), mask, bias, record=record)
    return tuple(found.values())


def gru_fused_backward(inputs: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    _, weight, _, h0, mask = inputs
    records = dict(zip(("hs", "gates", "candidates", "recurrent"), outputs, strict=True))
    found = kernels.backward("gru", weight, (h0,), mask, records, cotangents[0])
    d_gates = found["d_gates"]  # of the recurrent products
    d_bias = d_gates[..., 2 * h0.shape[-1] :].sum(axis=(0, 1))
    dh = add_matmul(found["carried_h"], d_gates[0], weight)
    d_weight = weight_gradient(d_gates, states_before(h0, records["hs"]), weight)
    return found["d_projected"], d_weight, d_bias, dh, mask


def gru_host_backward(inputs: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    _, weight, _, h0, mask = inputs
    d_projected, d_recurrent, dh = host.gru_backward(inputs, cotangents, outputs)
    d_bias = d_recurrent[..., 2 * h0.shape[-1] :].sum(axis=1).sum(axis=0)
    return d_projected, weight_gradient(d_recurrent, states_before(h0, outputs[0]), weight), d_bias, dh, mask


gru_scan = with_gradient(
    gru_forward,
    gru_backward,
    kernels.Fused(gru_fused, gru_fused_backward),
    kernels.Fused(host.gru_forward, gru_host_backward),
)


def rnn_forward(
    activate: Activation, projected: mx.array, weight: mx.array, h: mx.array, mask: mx.array | None
) -> Arrays:
    """Returns h after each step `[T, B, H]`, and no records."""
    weight = weight.T  # [H, H]
    hs = []
    for step in range(len(projected)):
        new = activate(add_matmul(projected[step], h, weight))
        h = where(None if mask is None else mask[step], new, h)
        hs.append(h)
    return (mx.stack(hs),), ()


def rnn_backward(derivative: Activation, inputs: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    """Returns the gradients of the inputs. `derivative` is the activation's, as a function of its output."""
    projected, weight, h0, mask = inputs
    (hs,) = outputs
    through = where(mask, derivative(hs), 0)
    dh = mx.zeros_like(h0)
    steps = []
    for step in reversed(range(len(projected))):
        dh = dh + cotangents[0][step]
        steps.append(dh * through[step])
        dh = add_matmul(padding_gradient(mask, dh, step), steps[-1], weight)
    d_projected = mx.stack(steps[::-1])
    return d_projected, weight_gradient(d_projected, states_before(h0, hs), weight), dh, mask


def rnn_fused(
    relu: bool, projected: mx.array, weight: mx.array, h: mx.array, mask: mx.array | None, *, record: bool
) -> Arrays:
    """Computes `rnn_forward` by a kernel."""
    return (kernels.forward("rnn", projected, weight, (h,), mask, record=record, relu=relu)["hs"],)


def rnn_fused_backward(relu: bool, inputs: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    _, weight, h0, mask = inputs
    found = kernels.backward("rnn", weight, (h0,), mask, {"hs": outputs[0]}, cotangents[0], relu=relu)
    d_gates = found["d_gates"]
    dh = add_matmul(None if mask is None else found["carried_h"], d_gates[0], weight)
    return d_gates, weight_gradient(d_gates, states_before(h0, outputs[0]), weight), dh, mask


def rnn_host_backward(relu: bool, inputs: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    _, weight, h0, mask = inputs
    d_gates, dh = host.rnn_backward(relu, inputs, cotangents, outputs)
    return d_gates, weight_gradient(d_gates, states_before(h0, outputs[0]), weight), dh, mask


tanh_scan = with_gradient(
    partial(rnn_forward, mx.tanh),
    partial(rnn_backward, lambda h: 1 - h * h),
    kernels.Fused(partial(rnn_fused, False), partial(rnn_fused_backward, False)),
    kernels.Fused(partial(host.rnn_forward, False), partial(rnn_host_backward, False)),
)
relu_scan = with_gradient(
    partial(rnn_forward, nn.relu),
    partial(rnn_backward, lambda h: (h > 0).astype(h.dtype)),
    kernels.Fused(partial(rnn_fused, True), partial(rnn_fused_backward, True)),
    kernels.Fused(partial(host.rnn_forward, True), partial(rnn_host_backward, True)),
)


def add_matmul(a: mx.array | None, h: mx.array, weight: mx.array) -> mx.array:
    """Returns a + h @ weight in the dtype of h; the product is computed in the dtype of the weight.

    h is `[B, n]`, weight `[n, m]`, a `[B, m]`, `[m]` or None.
    """
    if a is not None and weight.dtype == h.dtype:
        return mx.addmm(a, h, weight)
    product = (h.astype(weight.dtype) @ weight).astype(h.dtype)
    return product if a is None else a + product


def where(mask: mx.array | None, value: mx.array, padding: mx.array | float) -> mx.array:
    """Returns `value` where the mask is True or None, and `padding` elsewhere."""
    return value if mask is None else mx.where(mask, value, padding)


def padding_gradient(mask: mx.array | None, dh: mx.array, step: int) -> mx.array | None:
    """Returns the gradient of the state that padding copies through a step, or None without a mask."""
    return None if mask is None else mx.where(mask[step], mx.zeros_like(dh), dh)


def states_before(first: mx.array, after: mx.array) -> mx.array:
    """Returns the state before each step, `[T, B, H]`, from the first state `[B, H]` and those after each step."""
    return mx.concatenate([first[None], after[:-1]])


def weight_gradient(gradient: mx.array, states: mx.array, weight: mx.array) -> mx.array:
    """Returns the gradient `[n, m]` of a recurrent weight: the sum over steps and rows of gradient times state.

    gradient is `[T, B, n]`, states `[T, B, m]`.
    """
    left, right = (array.reshape(-1, array.shape[-1]).astype(weight.dtype) for array in (gradient, states))
    return left.T @ right
