"""Recurrent layers over time, PyTorch: LSTM, GRU and the simple RNN. The mirror is `icenet/nn/recurrent.py`.

One call of PyTorch's fused kernel reads a whole sequence in all directions (cuDNN on CUDA). Its kernels take
two biases a gate, of which the sum alone matters: the second one is given as zeros, and is never trained.

Shapes: T steps, B rows, I inputs, H hidden_size, G gates, D directions (1 or 2). Time is the first axis.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from icenet_torch.nn.arrays import is_half, on_cpu

State: TypeAlias = tuple[torch.Tensor, ...]
"""What a layer remembers: (h, c) of an LSTM, (h,) of the others, `[D, B, H]` each."""


class Recurrent(nn.Module):
    """What the three layers share: weights for each direction, and how a sequence is read.

    Parameters, G gates one below the other: `weight_ih` `[G*H, I]`, `weight_hh` `[G*H, H]`, `bias` `[G*H]`; of
    the direction that reads from the end `weight_ih_reverse` and so on. One bias a gate: PyTorch's modules have
    two, whose sum alone matters (`icenet.core.weights.torch_rnn` folds them).

    In half precision inputs and weights are rounded to it, and so are the outputs; state and gates are fp32
    (on CUDA cuDNN keeps the state in half precision too).
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
        """Reads x `[T, B, I]`: the outputs `[T, B, D*H]`, and the state after the last step.

        `state` is that before the first step, zeros when None. `mask` is bool `[T, B]`, False for padding,
        which leaves the state as it was and has outputs of zero.
        """
        dtype = product_dtype(x)
        zeros = x.new_zeros((len(self.directions), x.shape[1], self.hidden_size), dtype=dtype)
        start = tuple(part.to(dtype) for part in state) if state else (zeros,) * self.states
        weights = [part for direction in self.directions for part in self.kernel_weights(x, direction)]
        read = self.read if mask is None else self.read_step if len(x) == 1 else self.read_packed
        outputs, *end = read(x.to(dtype), start, weights, mask)
        return outputs.to(x.dtype), tuple(part.to(self.weight_ih.dtype) for part in end)

    def read(self, x: torch.Tensor, start: State, weights: list[torch.Tensor], mask: None) -> State:
        """The kernel on a sequence without padding: the outputs, then the parts of the last state."""
        return fused(self.kernel, (x,), start, weights, len(self.directions) == 2)

    def read_step(self, x: torch.Tensor, start: State, weights: list[torch.Tensor], mask: torch.Tensor) -> State:
        """One step with padding: read all rows, and put back the state of those that had none."""
        outputs, *end = self.read(x, start, weights, None)
        real = mask[..., None]  # [1, B, 1]
        return torch.where(real, outputs, 0), *(torch.where(real, a, b) for a, b in zip(end, start, strict=True))

    def read_packed(self, x: torch.Tensor, start: State, weights: list[torch.Tensor], mask: torch.Tensor) -> State:
        """A sequence with padding, wherever it is: each row's real steps are moved together and packed."""
        lengths = mask.sum(dim=0)
        order = torch.argsort(mask.int(), dim=0, descending=True, stable=True)  # [T, B]: the real steps first
        packed = pack_padded_sequence(
            x.gather(0, order[..., None].expand_as(x)),
            lengths.clamp(min=1).cpu(),  # a row without any real step reads one, which is put back below
            enforce_sorted=False,
        )
        data, batch_sizes, into, out_of = packed
        ordered = tuple(part.index_select(1, into) for part in start)
        y, *end = fused(self.kernel, (data, batch_sizes), ordered, weights, len(self.directions) == 2)
        y, _ = pad_packed_sequence(PackedSequence(y, batch_sizes, into, out_of), total_length=len(x))
        outputs = torch.zeros_like(y).scatter(0, order[..., None].expand_as(y), y)
        some = (lengths > 0)[:, None]  # [B, 1]
        kept = (torch.where(some, a.index_select(1, out_of), b) for a, b in zip(end, start, strict=True))
        return torch.where(mask[..., None], outputs, 0), *kept

    def kernel(self, *arguments: Any) -> State:
        """PyTorch's kernel; defined by each layer."""
        raise NotImplementedError

    def kernel_weights(self, x: torch.Tensor, direction: str) -> list[torch.Tensor]:
        """The weights as the kernel takes them: of inputs and state, the bias, and zeros for the second one."""
        names = ("weight_ih", "weight_hh", "bias")
        weights = [self.weight(name + direction, x) for name in names]
        return [*weights, torch.zeros_like(weights[-1])]

    def weight(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A parameter in the dtype that products are computed in, rounded to that of x before."""
        return getattr(self, name).to(x.dtype).to(product_dtype(x))


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """fp32 for half precision on a CPU, where such products are slow, else the dtype of x."""
    return torch.float32 if is_half(x) and on_cpu(x) else x.dtype


@torch.compiler.disable  # traced, the loop over time would be unrolled, and the kernel lost
def fused(
    kernel: Any, sequence: tuple[torch.Tensor, ...], start: State, weights: list[torch.Tensor], bidirectional: bool
) -> State:
    """One call of a kernel: a sequence `[T, B, I]`, or packed data and the rows of each of its steps."""
    state = start if len(start) > 1 else start[0]
    order = () if len(sequence) > 1 else (False,)  # batch_first, which packed data has no need of
    # one layer, no dropout; training, without which cuDNN keeps nothing for a gradient
    options = (True, 1, 0.0, torch.is_grad_enabled(), bidirectional, *order)
    with warnings.catch_warnings():
        # cuDNN copies the weights together at each call: small beside the sequence
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        return kernel(*sequence, state, weights, *options)


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997; with forget gates, Gers et al., 2000).

    i, f, o = sigmoid(W_ih x + W_hh h + b), g = tanh(the same); c' = f * c + i * g; h' = o * tanh(c').
    The gates lie in the order i, f, g, o.
    """

    gates = 4
    states = 2

    def kernel(self, *arguments: Any) -> State:
        return torch.lstm(*arguments)


class GRU(Recurrent):
    """The gated recurrent unit (Cho et al., 2014), the reset gate applied after the product, as cuDNN has it.

    r, z = sigmoid(W_ih x + W_hh h + b); n = tanh(W_in x + b_n + r * (W_hn h + b_hn)); h' = (1 - z) * n + z * h.
    The gates lie in the order r, z, n. Inside the reset n has a bias of its own: `bias_hn` `[H]`.
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
    """The simple recurrent network (Elman, 1990): h' = tanh(W_ih x + W_hh h + b), or relu of it."""

    gates = 1

    def __init__(
        self, input_size: int, hidden_size: int, bidirectional: bool = False, activation: str = "tanh"
    ) -> None:
        super().__init__(input_size, hidden_size, bidirectional)
        self.activation = activation

    def kernel(self, *arguments: Any) -> State:
        return torch.rnn_relu(*arguments) if self.activation == "relu" else torch.rnn_tanh(*arguments)
