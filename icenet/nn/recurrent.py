"""Recurrent layers, MLX: LSTM, GRU and the simple RNN. The mirror is `icenet_torch/nn/recurrent.py`.

One matrix product computes the contribution of the inputs to all gates at all steps. The loops over time, which only
compute the product with the state and the gates, are in `icenet.nn.recurrence.loops`.

Shapes: T steps, B rows, I inputs, H hidden_size, G gates, D directions (1 or 2). Time is the first axis.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.nn.arrays import cast_weight
from icenet.nn.linear import linear
from icenet.nn.recurrence.loops import Arrays, gru_scan, lstm_scan, relu_scan, tanh_scan

State: TypeAlias = tuple[mx.array, ...]
"""The state of a layer: (h, c) for an LSTM, (h,) for GRU and RNN, `[D, B, H]` each."""


class Recurrent(nn.Module):
    """The base class of the recurrent layers: the weights of each direction, and the forward pass.

    Parameters, with the rows of the G gates stacked: `weight_ih` `[G*H, I]`, `weight_hh` `[G*H, H]`, `bias` `[G*H]`;
    for the reverse direction `weight_ih_reverse` and so on. There is one bias per gate. PyTorch's modules have two,
    of which only the sum matters (`icenet.core.weights.torch_rnn` converts them).

    In half precision, inputs, weights and outputs are rounded to it; state and gates are fp32.

    Args:
        input_size: I.
        hidden_size: H.
        bidirectional: Whether a second set of weights reads the sequence in reverse.
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
        """Runs the layer over a sequence.

        Args:
            x: Inputs `[T, B, I]`.
            state: State before the first step, or None for zeros.
            mask: bool `[T, B]`, False for padding, which leaves the state unchanged and has zero outputs.

        Returns:
            Outputs `[T, B, D*H]`, and the state after the last step.
        """
        zeros = mx.zeros((x.shape[1], self.hidden_size), self.weight_ih.dtype)
        outputs: list[mx.array] = []
        ends: list[Arrays] = []
        for index, direction in enumerate(self.directions):
            start = [part[index].astype(zeros.dtype) for part in state] if state else [zeros] * self.states
            order = slice(None, None, -1 if direction else 1)
            y, *end = self.scan(x[order], start, None if mask is None else mask[order][..., None], direction)
            outputs.append(y[order])
            ends.append(tuple(end))
        joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-1)
        if mask is not None:
            joined = mx.where(mask[..., None], joined, 0)
        return joined.astype(x.dtype), tuple(mx.stack(list(parts)) for parts in zip(*ends, strict=True))

    def scan(self, x: mx.array, start: list[mx.array], mask: mx.array | None, direction: str) -> Arrays:
        """Runs one direction; defined by each layer. Returns the outputs `[T, B, H]`, then the last state."""
        raise NotImplementedError

    def weight(self, name: str, x: mx.array) -> mx.array:
        """Returns a parameter rounded to the dtype of x, in the dtype of products."""
        return cast_weight(self[name], x)

    def project(self, x: mx.array, direction: str) -> mx.array:
        """Returns the contribution of the inputs to all gates, `[T, B, G*H]`, in the dtype of the state."""
        weight, bias = self.weight("weight_ih" + direction, x), self.weight("bias" + direction, x)
        return linear(x.astype(weight.dtype), weight, bias).astype(self.weight_ih.dtype)


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997; with forget gates, Gers et al., 2000).

    i, f, o = sigmoid(W_ih x + W_hh h + b), g = tanh(the same); c' = f * c + i * g; h' = o * tanh(c').
    The rows of the gates are in the order i, f, g, o.

    Args and shapes are those of `Recurrent`.
    """

    gates = 4
    states = 2

    def scan(self, x: mx.array, start: list[mx.array], mask: mx.array | None, direction: str) -> Arrays:
        projected, weight = self.project(x, direction), self.weight("weight_hh" + direction, x)
        outputs, c, *_ = lstm_scan(projected, weight, *start, mask, training=self.training)
        return outputs, outputs[-1], c


class GRU(Recurrent):
    """Gated recurrent unit (Cho et al., 2014), with the reset gate after the product, as in cuDNN.

    r, z = sigmoid(W_ih x + W_hh h + b); n = tanh(W_in x + b_n + r * (W_hn h + b_hn)); h' = (1 - z) * n + z * h.
    The rows of the gates are in the order r, z, n. `bias_hn` `[H]` is a second bias of n, inside the reset gate.

    Args and shapes are those of `Recurrent`.
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
    """Simple recurrent network (Elman, 1990): h' = tanh(W_ih x + W_hh h + b), or relu in place of tanh.

    Args:
        input_size, hidden_size, bidirectional: As in `Recurrent`.
        activation: tanh or relu.
    """

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
