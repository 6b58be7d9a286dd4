"""Recurrent layers, PyTorch: LSTM, GRU and the simple RNN. The mirror is `icenet/nn/recurrent.py`.

One call of PyTorch's fused kernel (cuDNN on CUDA) runs all steps in all directions. The kernels take two biases per
gate, of which only the sum matters: the second one is passed as zeros and is not trained.

Shapes: T steps, B rows, I inputs, H hidden_size, G gates, D directions (1 or 2). Time is the first axis.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from icenet_torch.nn.arrays import cast_weight, product_dtype

State: TypeAlias = tuple[torch.Tensor, ...]
"""The state of a layer: (h, c) for an LSTM, (h,) for GRU and RNN, `[D, B, H]` each."""


class Recurrent(nn.Module):
    """The base class of the recurrent layers: the weights of each direction, and the forward pass.

    Parameters, with the rows of the G gates stacked: `weight_ih` `[G*H, I]`, `weight_hh` `[G*H, H]`, `bias` `[G*H]`;
    for the reverse direction `weight_ih_reverse` and so on. There is one bias per gate. PyTorch's modules have two,
    of which only the sum matters (`icenet.core.weights.torch_rnn` converts them).

    In half precision, inputs, weights and outputs are rounded to it; state and gates are fp32. On CUDA, cuDNN keeps
    the state in half precision, too.

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
            setattr(self, f"weight_ih{direction}", nn.Parameter(torch.empty(rows, input_size)))
            setattr(self, f"weight_hh{direction}", nn.Parameter(torch.empty(rows, hidden_size)))
            setattr(self, f"bias{direction}", nn.Parameter(torch.empty(rows)))

    def forward(
        self, x: torch.Tensor, state: State | None = None, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, State]:
        """Runs the layer over a sequence.

        Args:
            x: Inputs `[T, B, I]`.
            state: State before the first step, or None for zeros.
            mask: bool `[T, B]`, False for padding, which leaves the state unchanged and has zero outputs.

        Returns:
            Outputs `[T, B, D*H]`, and the state after the last step.
        """
        dtype = product_dtype(x)
        zeros = x.new_zeros((len(self.directions), x.shape[1], self.hidden_size), dtype=dtype)
        start = tuple(part.to(dtype) for part in state) if state else (zeros,) * self.states
        weights = [part for direction in self.directions for part in self.kernel_weights(x, direction)]
        run = self.run_unpadded if mask is None else self.run_padded_step if len(x) == 1 else self.run_padded
        outputs, *end = run(x.to(dtype), start, weights, mask)
        return outputs.to(x.dtype), tuple(part.to(self.weight_ih.dtype) for part in end)

    def run_unpadded(self, x: torch.Tensor, start: State, weights: list[torch.Tensor], mask: None) -> State:
        """Runs the kernel on a sequence without padding. Returns the outputs, then the last state."""
        return call_kernel(self.kernel, (x,), start, weights, len(self.directions) == 2)

    def run_padded_step(
        self, x: torch.Tensor, start: State, weights: list[torch.Tensor], mask: torch.Tensor
    ) -> State:
        """Runs one step with padding: computes all rows and restores the state of padded rows."""
        outputs, *end = self.run_unpadded(x, start, weights, None)
        is_token = mask[..., None]  # [1, B, 1]
        return (
            torch.where(is_token, outputs, 0),
            *(torch.where(is_token, new, old) for new, old in zip(end, start, strict=True)),
        )

    def run_padded(self, x: torch.Tensor, start: State, weights: list[torch.Tensor], mask: torch.Tensor) -> State:
        """Runs a sequence with padding anywhere: the unpadded steps of each row are moved together and packed."""
        lengths = mask.sum(dim=0)
        order = torch.argsort(mask.int(), dim=0, descending=True, stable=True)  # [T, B], unpadded steps first
        packed = pack_padded_sequence(
            x.gather(0, order[..., None].expand_as(x)),
            lengths.clamp(min=1).cpu(),  # an empty row runs one step, whose results are replaced below
            enforce_sorted=False,
        )
        data, batch_sizes, sorted_rows, original_rows = packed
        sorted_start = tuple(part.index_select(1, sorted_rows) for part in start)
        y, *end = call_kernel(self.kernel, (data, batch_sizes), sorted_start, weights, len(self.directions) == 2)
        y, _ = pad_packed_sequence(PackedSequence(y, batch_sizes, sorted_rows, original_rows), total_length=len(x))
        outputs = torch.zeros_like(y).scatter(0, order[..., None].expand_as(y), y)
        has_tokens = (lengths > 0)[:, None]  # [B, 1]
        last = (
            torch.where(has_tokens, new.index_select(1, original_rows), old)
            for new, old in zip(end, start, strict=True)
        )
        return torch.where(mask[..., None], outputs, 0), *last

    def kernel(self, *arguments: Any) -> State:
        """Calls PyTorch's kernel; defined by each layer."""
        raise NotImplementedError

    def kernel_weights(self, x: torch.Tensor, direction: str) -> list[torch.Tensor]:
        """Returns the kernel's weights: for inputs and state, the bias, and zeros for the second bias."""
        names = ("weight_ih", "weight_hh", "bias")
        weights = [self.weight(name + direction, x) for name in names]
        return [*weights, torch.zeros_like(weights[-1])]

    def weight(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Returns a parameter rounded to the dtype of x, in the dtype of products."""
        return cast_weight(getattr(self, name), x)


def call_kernel(
    kernel: Any, sequence: tuple[torch.Tensor, ...], start: State, weights: list[torch.Tensor], bidirectional: bool
) -> State:
    """Calls a kernel on a sequence `[T, B, I]`, or on packed data and the number of rows of each step.

    `torch.compile` does not trace the call, which would replace the kernel by an unrolled loop over time.
    """
    # torch.compiler.disable imports the compiler, which takes seconds: only where something is compiled
    call = _call_untraced if "torch._dynamo" in sys.modules else _call
    return call(kernel, sequence, start, weights, bidirectional)


def _call(
    kernel: Any, sequence: tuple[torch.Tensor, ...], start: State, weights: list[torch.Tensor], bidirectional: bool
) -> State:
    state = start if len(start) > 1 else start[0]
    batch_first = () if len(sequence) > 1 else (False,)  # not an argument for packed data
    # has_biases, num_layers, dropout, train (without it, cuDNN keeps nothing for the gradient), bidirectional
    options = (True, 1, 0.0, torch.is_grad_enabled(), bidirectional, *batch_first)
    with warnings.catch_warnings():
        # cuDNN copies the weights into one buffer at each call, a small cost next to the sequence
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        return kernel(*sequence, state, weights, *options)


_call_untraced = torch._disable_dynamo(_call)  # imports the compiler at its first call


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997; with forget gates, Gers et al., 2000).

    i, f, o = sigmoid(W_ih x + W_hh h + b), g = tanh(the same); c' = f * c + i * g; h' = o * tanh(c').
    The rows of the gates are in the order i, f, g, o.

    Args and shapes are those of `Recurrent`.
    """

    gates = 4
    states = 2

    def kernel(self, *arguments: Any) -> State:
        return torch.lstm(*arguments)


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
            setattr(self, f"bias_hn{direction}", nn.Parameter(torch.empty(hidden_size)))

    def kernel(self, *arguments: Any) -> State:
        return torch.gru(*arguments)

    def kernel_weights(self, x: torch.Tensor, direction: str) -> list[torch.Tensor]:
        *weights, zeros = super().kernel_weights(x, direction)
        return [*weights, torch.cat([zeros[: 2 * self.hidden_size], self.weight("bias_hn" + direction, x)])]


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

    def kernel(self, *arguments: Any) -> State:
        return torch.rnn_relu(*arguments) if self.activation == "relu" else torch.rnn_tanh(*arguments)
