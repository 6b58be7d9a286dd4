"""Recurrent language models: LSTM, GRU and the simple RNN, PyTorch.

    tokens -> embedding * sqrt(H) -> N x [recurrent layer, dropout between layers] -> vocabulary

Shapes: B batch, T positions, N num_layers, H hidden_size, D directions (1, or 2 if bidirectional),
V vocab_size. The mirror is `icenet/models/rnn.py`.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import torch
from torch import nn

from icenet.core.config import RecurrentConfig
from icenet.core.errors import UsageError
from icenet.core.generation.cache import RecurrentCache
from icenet_torch import nn as ops
from icenet_torch.models.base import BaseModel
from icenet_torch.nn.recurrent import GRU, LSTM, RNN, Recurrent, State

Hidden: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]
"""The state of all layers as in `torch.nn.LSTM`: (h, c) for an LSTM, h for GRU and RNN, `[N*D, B, H]` each."""


class RecurrentModel(BaseModel):
    """The base class of the three models. Bidirectional models compute features and cannot generate."""

    config: RecurrentConfig
    family: ClassVar[str]

    def __init__(self, config: RecurrentConfig, seed: int | None = 0) -> None:
        super().__init__(config)
        if config.type != self.family:
            raise UsageError(f"{type(self).__name__}: model.type is {config.type}; it must be {self.family}")
        width = config.hidden_size
        joined = 2 * width if config.bidirectional else width
        self.token_embedding = ops.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(self.make_layer(joined if index else width) for index in range(config.num_layers))
        self.dropouts = nn.ModuleList(ops.Dropout(config.dropout) for _ in range(config.num_layers - 1))
        if not config.tie_embeddings:
            self.output = ops.Linear(joined, config.vocab_size, bias=False)
        if seed is not None:
            self.init_weights(seed)

    def make_layer(self, input_size: int) -> Recurrent:
        """Returns one recurrent layer; defined by each model."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: torch.Tensor,
        hidden: Hidden | None = None,
        attention_mask: torch.Tensor | None = None,
        return_hidden: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, Hidden]:
        """Computes logits of tokens. A sequence in pieces, with the state passed on, has the same logits as a whole.

        Args:
            input_ids: Tokens, int `[B, T]`.
            hidden: State before the first token, as returned by an earlier call, or None for zeros.
            attention_mask: `[B, T]`, 0 or False for padding, which leaves the state unchanged. With `hidden` it may
                include the tokens before.
            return_hidden: Whether to also return the state after the last token.

        Returns:
            Logits `[B, T, V]`, or a tuple of logits and state.
        """
        self.check_tokens(input_ids, attention_mask, 0 if hidden is None else None)
        states = None if hidden is None else self.split_hidden(hidden, input_ids.shape[0])
        x, states = self.run_layers(input_ids, attention_mask, states)
        logits = self.project(x)
        return (logits, self.join_hidden(states)) if return_hidden else logits

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: RecurrentCache | None = None,
    ) -> torch.Tensor:
        """Returns the input of the output projection, `[B, T, D*H]`: the features of each position.

        A cache provides the state after earlier tokens and is updated; `attention_mask` may cover those tokens too.
        """
        x, states = self.run_layers(input_ids, attention_mask, cache.states if cache else None)
        if cache:
            cache.states = states
        return x

    def run_layers(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, states: list[State] | None
    ) -> tuple[torch.Tensor, list[State]]:
        """Returns the outputs of the last layer, `[B, T, D*H]`, and the state of each layer after the last token."""
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, -input_ids.shape[1] :].to(torch.bool).T  # [T, B]
        x = (
            self.token_embedding(input_ids.T) * self.config.hidden_size**0.5
        )  # [T, B, H]: time is the first axis in the layers
        x = x.to(self.compute_dtype)
        ends: list[State] = []
        for index, layer in enumerate(self.layers):
            if index > 0:
                x = self.dropouts[index - 1](x.swapaxes(0, 1)).swapaxes(
                    0, 1
                )  # dropout keys are per row, the first axis
            start = states[index] if states else None
            if self.gradient_checkpointing and self.training:
                x, end = ops.checkpoint(layer, x, start, mask)
            else:
                x, end = layer(x, start, mask)
            ends.append(end)
        return x.swapaxes(0, 1), ends

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns logits `[..., V]` of hidden states `[..., D*H]`."""
        if self.config.tie_embeddings:
            return self.token_embedding.as_linear(hidden_states)
        return self.output(hidden_states)

    def make_cache(self) -> RecurrentCache:
        """Returns an empty cache."""
        return RecurrentCache()

    def join_hidden(self, states: list[State]) -> Hidden:
        """Joins the states of the layers into one array per state."""
        parts = tuple(torch.cat(part) for part in zip(*states, strict=True))
        return parts if len(parts) > 1 else parts[0]

    def split_hidden(self, hidden: Hidden, batch: int) -> list[State]:
        """Splits a hidden state into the states of the layers. Raises UsageError if the shapes are wrong."""
        parts = tuple(hidden) if isinstance(hidden, (tuple, list)) else (hidden,)
        directions = 2 if self.config.bidirectional else 1
        expected = [[self.config.num_layers * directions, batch, self.config.hidden_size]] * self.layers[0].states
        found = [list(part.shape) if isinstance(part, self.array_type) else type(part).__name__ for part in parts]
        if found != expected:
            raise UsageError(f"hidden: shapes {found} must be {expected} (layers, batch, hidden_size)")
        layers = range(0, expected[0][0], directions)
        return [tuple(part[first : first + directions] for part in parts) for first in layers]


class LSTMModel(RecurrentModel):
    """A language model of LSTM layers: embedding, recurrent layers, output projection."""

    family = "lstm"

    def make_layer(self, input_size: int) -> Recurrent:
        return LSTM(input_size, self.config.hidden_size, self.config.bidirectional)


class GRUModel(RecurrentModel):
    """A language model of GRU layers: embedding, recurrent layers, output projection."""

    family = "gru"

    def make_layer(self, input_size: int) -> Recurrent:
        return GRU(input_size, self.config.hidden_size, self.config.bidirectional)


class RNNModel(RecurrentModel):
    """A language model of simple recurrent layers: embedding, recurrent layers, output projection."""

    family = "rnn"

    def make_layer(self, input_size: int) -> Recurrent:
        return RNN(input_size, self.config.hidden_size, self.config.bidirectional, self.config.activation)
