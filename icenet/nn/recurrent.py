"""Recurrent layers over time, MLX: LSTM, GRU and the simple RNN. The mirror is `icenet_torch/nn/recurrent.py`.

The products with the inputs do not wait for one another, so they are one product for all steps. What is left
in the loop over time is the product with the state and the gates: `lstm_scan`, `gru_scan` and `rnn_scan` at the
end of this file, each with its gradient written out. They are the place for kernels that fuse the loop on a GPU.

The gradients are written out because automatic differentiation would form the gradient of the recurrent
weights once a step and add the steps up; here it is one product over all steps, as in PyTorch's kernels: half
the time on a CPU, and more exact. Whatever does not depend on the gradient that runs back through time is
computed for all steps at once, before the loop.

Shapes: T steps, B rows, I inputs, H hidden_size, G gates, D directions (1 or 2). Time is the first axis.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypeAlias

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.nn.arrays import is_half, on_cpu
from icenet.nn.linear import linear

State: TypeAlias = tuple[mx.array, ...]
"""What a layer remembers: (h, c) of an LSTM, (h,) of the others, `[D, B, H]` each."""

Arrays: TypeAlias = tuple[Any, ...]
Activation: TypeAlias = Callable[[mx.array], mx.array]


class Recurrent(nn.Module):
    """What the three layers share: weights for each direction, and how a sequence is read.

    Parameters, G gates one below the other: `weight_ih` `[G*H, I]`, `weight_hh` `[G*H, H]`, `bias` `[G*H]`; of
    the direction that reads from the end `weight_ih_reverse` and so on. One bias a gate: PyTorch's modules have
    two, whose sum alone matters (`icenet.core.weights.torch_rnn` folds them).

    In half precision inputs and weights are rounded to it, and so are the outputs; state and gates are fp32.
    """

    layer_kind: ClassVar[str] = "recurrent"
    gates: ClassVar[int]
    states: ClassVar[int] = 1

    def __init__(self, input_size: int, hidden_size: int, bidirectional: bool = False) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.directions = ("", "_reverse") if bidirectional else ("",)
        rows = self.gates * hidden_size
        for direction in self.directions:
            setattr(self, f"weight_ih{direction}", mx.zeros((rows, input_size)))
            setattr(self, f"weight_hh{direction}", mx.zeros((rows, hidden_size)))
            setattr(self, f"bias{direction}", mx.zeros((rows,)))

    def __call__(
        self, x: mx.array, state: State | None = None, mask: mx.array | None = None
    ) -> tuple[mx.array, State]:
        """Reads x `[T, B, I]`: the outputs `[T, B, D*H]`, and the state after the last step.

        `state` is that before the first step, zeros when None. `mask` is bool `[T, B]`, False for padding,
        which leaves the state as it was and has outputs of zero.
        """
        zeros = mx.zeros((x.shape[1], self.hidden_size), self.weight_ih.dtype)
        outputs: list[mx.array] = []
        ends: list[Arrays] = []
        for index, direction in enumerate(self.directions):
            start = [part[index].astype(zeros.dtype) for part in state] if state else [zeros] * self.states
            turn = slice(None, None, -1 if direction else 1)  # the second direction reads from the end
            y, *end = self.scan(x[turn], start, None if mask is None else mask[turn][..., None], direction)
            outputs.append(y[turn])
            ends.append(tuple(end))
        joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-1)
        if mask is not None:
            joined = mx.where(mask[..., None], joined, 0)
        return joined.astype(x.dtype), tuple(mx.stack(list(parts)) for parts in zip(*ends, strict=True))

    def scan(self, x: mx.array, start: list[mx.array], mask: mx.array | None, direction: str) -> Arrays:
        """One direction: the outputs `[T, B, H]`, then each part of the last state; defined by each layer."""
        raise NotImplementedError

    def weight(self, name: str, x: mx.array) -> mx.array:
        """A parameter in the dtype that products are computed in, rounded to that of x before."""
        return self[name].astype(x.dtype).astype(product_dtype(x))

    def project(self, x: mx.array, direction: str) -> mx.array:
        """The inputs' part of every gate at every step, `[T, B, G*H]`, in the dtype of the state."""
        weight, bias = self.weight("weight_ih" + direction, x), self.weight("bias" + direction, x)
        return linear(x.astype(weight.dtype), weight, bias).astype(self.weight_ih.dtype)


def product_dtype(x: mx.array) -> mx.Dtype:
    """fp32 for half precision on a CPU, where such products are slow, else the dtype of x."""
    return mx.float32 if is_half(x) and on_cpu() else x.dtype


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997; with forget gates, Gers et al., 2000).

    i, f, o = sigmoid(W_ih x + W_hh h + b), g = tanh(the same); c' = f * c + i * g; h' = o * tanh(c').
    The gates lie in the order i, f, g, o.
    """

    gates = 4
    states = 2

    def scan(self, x: mx.array, start: list[mx.array], mask: mx.array | None, direction: str) -> Arrays:
        projected, weight = self.project(x, direction), self.weight("weight_hh" + direction, x)
        outputs, c, *_ = lstm_scan(projected, weight, *start, mask, training=self.training)
        return outputs, outputs[-1], c


class GRU(Recurrent):
    """The gated recurrent unit (Cho et al., 2014), the reset gate applied after the product, as cuDNN has it.

    r, z = sigmoid(W_ih x + W_hh h + b); n = tanh(W_in x + b_n + r * (W_hn h + b_hn)); h' = (1 - z) * n + z * h.
    The gates lie in the order r, z, n. Inside the reset n has a bias of its own: `bias_hn` `[H]`.
    """

    gates = 3

    def __init__(self, input_size: int, hidden_size: int, bidirectional: bool = False) -> None:
        super().__init__(input_size, hidden_size, bidirectional)
        for direction in self.directions:
            setattr(self, f"bias_hn{direction}", mx.zeros((hidden_size,)))

    def scan(self, x: mx.array, start: list[mx.array], mask: mx.array | None, direction: str) -> Arrays:
        projected, weight = self.project(x, direction), self.weight("weight_hh" + direction, x)
        bias = self.weight("bias_hn" + direction, x).astype(projected.dtype)
        outputs, *_ = gru_scan(projected, weight, bias, *start, mask, training=self.training)
        return outputs, outputs[-1]


class RNN(Recurrent):
    """The simple recurrent network (Elman, 1990): h' = tanh(W_ih x + W_hh h + b), or relu of it."""

    gates = 1

    def __init__(
        self, input_size: int, hidden_size: int, bidirectional: bool = False, activation: str = "tanh"
    ) -> None:
        super().__init__(input_size, hidden_size, bidirectional)
        self.activation = activation

    def scan(self, x: mx.array, start: list[mx.array], mask: mx.array | None, direction: str) -> Arrays:
        projected, weight = self.project(x, direction), self.weight("weight_hh" + direction, x)
        scan = relu_scan if self.activation == "relu" else tanh_scan
        outputs, *_ = scan(projected, weight, *start, mask, training=self.training)
        return outputs, outputs[-1]


# ---- the loops over time ------------------------------------------------------------------------------------
#
# projected `[T, B, G*H]` is the inputs' part of the gates; weight `[G*H, H]` has the dtype of products; h and c
# `[B, H]` are the state before the first step; mask is bool `[T, B, 1]` or None.


def differentiable(forward: Callable[..., Any], gradient: Callable[..., Arrays]) -> Callable[..., Any]:
    """A loop over time and its gradient as one function, called with `training`.

    `forward(*inputs)` gives the results, and records: lists with a value for every step, which
    `gradient(inputs, cotangents, (*results, *records))` needs. They are kept in training. In evaluation they
    are dropped, since to keep them costs up to a quarter of the time; where a gradient is asked for after all,
    the sequence is read once more.
    """

    def keep(*inputs: Any) -> Arrays:
        results, records = forward(*inputs)
        return *results, *(mx.stack(record) for record in records)

    def drop(*inputs: Any) -> Arrays:
        return forward(*inputs)[0]

    kept, dropped = mx.custom_function(keep), mx.custom_function(drop)
    kept.vjp(gradient)
    dropped.vjp(lambda inputs, cotangents, _: gradient(inputs, cotangents, keep(*inputs)))
    return lambda *inputs, training: (kept if training else dropped)(*inputs)


def lstm(projected: mx.array, weight: mx.array, h: mx.array, c: mx.array, mask: mx.array | None) -> Arrays:
    """h after every step `[T, B, H]`, c after the last `[B, H]`; records c, tanh(c) and the gates."""
    half, one = mx.full(h.shape, 0.5), mx.ones(h.shape)
    scale = mx.concatenate([half, half, one, half], axis=-1)  # sigmoid(a) = tanh(a / 2) / 2 + 1 / 2, so that
    shift = mx.concatenate([half, half, one * 0, half], axis=-1)  # all four gates are one call of tanh
    weight = weight.T  # [H, 4H]
    hs, cs, squashed, gates = [], [], [], []
    for step in range(len(projected)):
        now = None if mask is None else mask[step]
        gates.append(mx.tanh(add_product(projected[step], h, weight) * scale) * scale + shift)
        i, f, g, o = mx.split(gates[-1], 4, axis=-1)  # [B, H] each
        c = where(now, f * c + i * g, c)
        squashed.append(mx.tanh(c))
        h = where(now, o * squashed[-1], h)
        cs.append(c)
        hs.append(h)
    return (mx.stack(hs), c), (cs, squashed, gates)


def lstm_gradient(inputs: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    projected, weight, h0, c0, mask = inputs
    hs, _, cs, s, gates = outputs
    i, f, g, o = mx.split(gates, 4, axis=-1)  # [T, B, H] each
    # before its activation a gate has the gradient [dc, dc, dc, dh] * through, where dc holds dh * through_c
    inner = [g * i * (1 - i), before(c0, cs) * f * (1 - f), i * (1 - g * g), s * o * (1 - o)]
    through = where(mask, mx.concatenate(inner, axis=-1), 0)
    through_c = where(mask, o * (1 - s * s), 0)
    kept_c = where(mask, f, 1)
    dh, dc = mx.zeros_like(h0), cotangents[1]
    d_gates = []
    for step in reversed(range(len(projected))):
        dh = dh + cotangents[0][step]
        dc = dc + dh * through_c[step]
        d_gates.append(mx.concatenate([dc, dc, dc, dh], axis=-1) * through[step])
        dh = add_product(kept_h(mask, dh, step), d_gates[-1], weight)
        dc = dc * kept_c[step]
    d_projected = mx.stack(d_gates[::-1])
    return d_projected, over_steps(d_projected, before(h0, hs), weight), dh, dc, mask


lstm_scan = differentiable(lstm, lstm_gradient)


def gru(projected: mx.array, weight: mx.array, bias_hn: mx.array, h: mx.array, mask: mx.array | None) -> Arrays:
    """h after every step `[T, B, H]`; records r and z, n, and the state's part of n."""
    two = [2 * h.shape[-1]]  # where the gates r and z end, and n begins
    projected_rz, projected_n = mx.split(projected, two, axis=-1)
    bias = mx.concatenate([mx.zeros(two, bias_hn.dtype), bias_hn])  # [3H]
    weight = weight.T  # [H, 3H]
    hs, gates, candidates, carried = [], [], [], []
    for step in range(len(projected)):
        carried_rz, carried_n = mx.split(add_product(bias, h, weight), two, axis=-1)
        gates.append(mx.sigmoid(projected_rz[step] + carried_rz))
        r, z = mx.split(gates[-1], 2, axis=-1)  # [B, H] each
        n = mx.tanh(projected_n[step] + r * carried_n)
        h = where(None if mask is None else mask[step], n + z * (h - n), h)
        candidates.append(n)
        carried.append(carried_n)
        hs.append(h)
    return (mx.stack(hs),), (gates, candidates, carried)


def gru_gradient(inputs: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    projected, weight, _, h0, mask = inputs
    hs, gates, n, carried_n = outputs
    r, z = mx.split(gates, 2, axis=-1)  # [T, B, H] each
    # dh times these is the gradient of r, z and n before their activations, and of the state's part of n
    through_n = where(mask, (1 - z) * (1 - n * n), 0)
    through_z = where(mask, (before(h0, hs) - n) * z * (1 - z), 0)
    through = mx.concatenate([through_n * carried_n * r * (1 - r), through_z, through_n * r], axis=-1)
    kept = where(mask, z, 1)
    dh = mx.zeros_like(h0)
    d_hs, d_carried = [], []
    for step in reversed(range(len(projected))):
        dh = dh + cotangents[0][step]
        d_hs.append(dh)
        d_carried.append(mx.concatenate([dh, dh, dh], axis=-1) * through[step])
        dh = add_product(dh * kept[step], d_carried[-1], weight)
    d_all = mx.stack(d_carried[::-1])  # [T, B, 3H]
    d_rz, d_carried_n = mx.split(d_all, [2 * h0.shape[-1]], axis=-1)
    d_projected = mx.concatenate([d_rz, mx.stack(d_hs[::-1]) * through_n], axis=-1)
    d_bias = d_carried_n.sum(axis=1).sum(axis=0)  # in two stages: MLX's CPU adds a long sum up term by term
    return d_projected, over_steps(d_all, before(h0, hs), weight), d_bias, dh, mask


gru_scan = differentiable(gru, gru_gradient)


def rnn(activate: Activation, projected: mx.array, weight: mx.array, h: mx.array, mask: mx.array | None) -> Arrays:
    """h after every step `[T, B, H]`."""
    weight = weight.T  # [H, H]
    hs = []
    for step in range(len(projected)):
        new = activate(add_product(projected[step], h, weight))
        h = where(None if mask is None else mask[step], new, h)
        hs.append(h)
    return (mx.stack(hs),), ()


def rnn_gradient(slope: Activation, inputs: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    projected, weight, h0, mask = inputs
    (hs,) = outputs
    through = where(mask, slope(hs), 0)
    dh = mx.zeros_like(h0)
    steps = []
    for step in reversed(range(len(projected))):
        dh = dh + cotangents[0][step]
        steps.append(dh * through[step])
        dh = add_product(kept_h(mask, dh, step), steps[-1], weight)
    d_projected = mx.stack(steps[::-1])
    return d_projected, over_steps(d_projected, before(h0, hs), weight), dh, mask


tanh_scan = differentiable(partial(rnn, mx.tanh), partial(rnn_gradient, lambda h: 1 - h * h))
relu_scan = differentiable(partial(rnn, nn.relu), partial(rnn_gradient, lambda h: (h > 0).astype(h.dtype)))


def add_product(a: mx.array | None, h: mx.array, weight: mx.array) -> mx.array:
    """a + h `[B, n]` times weight `[n, m]`: `[B, m]` in the dtype of h, the product computed in the weight's."""
    if a is not None and weight.dtype == h.dtype:
        return mx.addmm(a, h, weight)
    product = (h.astype(weight.dtype) @ weight).astype(h.dtype)
    return product if a is None else a + product


def where(mask: mx.array | None, value: mx.array, padding: mx.array | float) -> mx.array:
    """`value` at real positions, `padding` at the others."""
    return value if mask is None else mx.where(mask, value, padding)


def kept_h(mask: mx.array | None, dh: mx.array, step: int) -> mx.array | None:
    """The gradient that passes by a step's gates: that of a state which padding left as it was."""
    return None if mask is None else mx.where(mask[step], mx.zeros_like(dh), dh)


def before(first: mx.array, after: mx.array) -> mx.array:
    """The state before every step `[T, B, H]`: the first `[B, H]`, then that after each step but the last."""
    return mx.concatenate([first[None], after[:-1]])


def over_steps(gradient: mx.array, states: mx.array, weight: mx.array) -> mx.array:
    """The gradient `[n, m]` of a weight: gradient `[T, B, n]` times states `[T, B, m]`, over all steps and rows."""
    left, right = (array.reshape(-1, array.shape[-1]).astype(weight.dtype) for array in (gradient, states))
    return left.T @ right
