"""Recurrent language models: LSTM, GRU and the simple RNN, MLX.

    tokens -> embedding * sqrt(H) -> N x [recurrent layer, dropout between layers] -> vocabulary

Shapes: B batch, T positions, N num_layers, H hidden_size, D directions (1, or 2 where bidirectional),
V vocab_size. The mirror is `icenet_torch/models/rnn.py`.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet import nn as ops
from icenet.core.config import RecurrentConfig
from icenet.core.errors import UsageError
from icenet.generation.cache import RecurrentCache
from icenet.models.base import BaseModel
from icenet.nn.recurrent import GRU, LSTM, RNN, Recurrent, State

Hidden: TypeAlias = mx.array | tuple[mx.array, ...]
"""What the model remembers, as `torch.nn.LSTM` has it: (h, c) of an LSTM, h of the others, `[N*D, B, H]` each."""


class RecurrentModel(BaseModel):
    """What the three models share; bidirectional ones give features and tags, and generate nothing."""

    config: RecurrentConfig
    family: ClassVar[str]

    def __init__(self, config: RecurrentConfig, seed: int | None = 0) -> None:
        super().__init__(config)
        if config.type != self.family:
            raise UsageError(f"{type(self).__name__}: model.type is {config.type}, where {self.family} is wanted")
        width = config.hidden_size
        joined = 2 * width if config.bidirectional else width
        self.token_embedding = ops.Embedding(config.vocab_size, width)
        self.layers = [self.make_layer(joined if index else width) for index in range(config.num_layers)]
        self.dropouts = [ops.Dropout(config.dropout) for _ in range(config.num_layers - 1)]
        if not config.tie_embeddings:
            self.output = ops.Linear(joined, config.vocab_size, bias=False)
        if seed is not None:
            self.init_weights(seed)

    def make_layer(self, input_size: int) -> Recurrent:
        """One recurrent layer; defined by each model."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: mx.array,
        hidden: Hidden | None = None,
        attention_mask: mx.array | None = None,
        return_hidden: bool = False,
    ) -> mx.array | tuple[mx.array, Hidden]:
        """Logits `[B, T, V]` of tokens int `[B, T]`; with `return_hidden` also the state after the last one.

        `hidden` is the state before the first token: what an earlier call returned, or None for zeros. A
        sequence read in pieces, the state handed on, gives what it gives when read whole.

        `attention_mask` is `[B, T]`, 0 or False where a position is padding: it leaves the state as it was.
        """
        states = None if hidden is None else self.split_hidden(hidden, input_ids.shape[0])
        x, states = self.read(input_ids, attention_mask, states)
        logits = self.project(x)
        return (logits, self.join_hidden(states)) if return_hidden else logits

    def hidden_states(
        self,
        input_ids: mx.array,
        attention_mask: mx.array | None = None,
        cache: RecurrentCache | None = None,
    ) -> mx.array:
        """What the output projection reads, `[B, T, D*H]`: the features of each position.

        A cache goes on from the tokens read before; `attention_mask` may cover those too.
        """
        x, states = self.read(input_ids, attention_mask, cache.states if cache else None)
        if cache:
            cache.states = states
        return x

    def read(
        self, input_ids: mx.array, attention_mask: mx.array | None, states: list[State] | None
    ) -> tuple[mx.array, list[State]]:
        """The last layer's outputs `[B, T, D*H]`, and the state of every layer after the last token."""
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, -input_ids.shape[1] :].astype(mx.bool_).T  # [T, B]
        x = self.token_embedding(input_ids.T) * self.config.hidden_size**0.5  # [T, B, H]: time first from here
        x = x.astype(self.compute_dtype)
        ends: list[State] = []
        for index, layer in enumerate(self.layers):
            if index > 0:
                x = self.dropouts[index - 1](x.swapaxes(0, 1)).swapaxes(0, 1)  # rows first, see Dropout
            start = states[index] if states else None
            if self.gradient_checkpointing and self.training:
                x, end = ops.checkpoint(layer, x, start, mask)
            else:
                x, end = layer(x, start, mask)
            ends.append(end)
        return x.swapaxes(0, 1), ends

    def project(self, hidden_states: mx.array) -> mx.array:
        """Logits `[..., V]` of hidden states `[..., D*H]`."""
        if self.config.tie_embeddings:
            return self.token_embedding.as_linear(hidden_states)
        return self.output(hidden_states)

    def make_cache(self) -> RecurrentCache:
        """The state before any token."""
        return RecurrentCache()

    def join_hidden(self, states: list[State]) -> Hidden:
        """The states of the layers, one array for each part."""
        parts = tuple(mx.concatenate(list(part)) for part in zip(*states, strict=True))
        return parts if len(parts) > 1 else parts[0]

    def split_hidden(self, hidden: Hidden, batch: int) -> list[State]:
        """The inverse of `join_hidden`; raises UsageError where the shapes are not those of this model."""
        parts = tuple(hidden) if isinstance(hidden, (tuple, list)) else (hidden,)
        directions = 2 if self.config.bidirectional else 1
        wanted = [[self.config.num_layers * directions, batch, self.config.hidden_size]] * self.layers[0].states
        found = [list(part.shape) for part in parts]
        if found != wanted:
            raise UsageError(f"hidden: arrays of {found}, where {wanted} are wanted (layers, batch, hidden_size)")
        layers = range(0, wanted[0][0], directions)
        return [tuple(part[first : first + directions] for part in parts) for first in layers]


class LSTMModel(RecurrentModel):
    """Embedding, layers of long short-term memory, output projection."""

    family = "lstm"

    def make_layer(self, input_size: int) -> Recurrent:
        return LSTM(input_size, self.config.hidden_size, self.config.bidirectional)


class GRUModel(RecurrentModel):
    """Embedding, layers of gated recurrent units, output projection."""

    family = "gru"

    def make_layer(self, input_size: int) -> Recurrent:
        return GRU(input_size, self.config.hidden_size, self.config.bidirectional)


class RNNModel(RecurrentModel):
    """Embedding, simple recurrent layers, output projection."""

    family = "rnn"

    def make_layer(self, input_size: int) -> Recurrent:
        return RNN(input_size, self.config.hidden_size, self.config.bidirectional, self.config.activation)
