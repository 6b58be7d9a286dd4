"""The transformer (Vaswani et al., "Attention is all you need", 2017), PyTorch.

    tokens -> embedding * sqrt(D) + sinusoidal positions -> N x [attention, feed-forward] -> vocabulary

Shapes: B batch, T new positions, S all positions (those in the cache and T), H heads, D hidden_size,
F feed-forward width, V vocab_size. The mirror is `icenet/models/transformer.py`.
"""

from __future__ import annotations

import torch
from torch import nn

from icenet.core.config import TransformerConfig
from icenet.core.models.init import sinusoidal_positions
from icenet_torch import nn as ops
from icenet_torch.generation.cache import KVCache, LayerCache
from icenet_torch.models.base import BaseModel


class Attention(nn.Module):
    """Multi-head scaled dot-product attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = ops.Linear(width, width)
        self.k_proj = ops.Linear(width, width)
        self.v_proj = ops.Linear(width, width)
        self.out_proj = ops.Linear(width, width, init_scale=(2 * config.num_layers) ** -0.5)
        self.dropout = ops.Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, mask: str | torch.Tensor | None, cache: LayerCache | None = None
    ) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            projection(x).reshape(batch, length, self.num_heads, -1).swapaxes(1, 2)  # [B, H, T, D/H]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            k, v = cache.append(k, v)  # [B, H, S, D/H]
        mixed = ops.scaled_dot_product_attention(q, k, v, mask).swapaxes(1, 2).reshape(batch, length, width)
        return self.dropout(self.out_proj(mixed))


class FeedForward(nn.Module):
    """Two linear layers with an activation between them; its width is F = feed_forward_multiplier * D."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        inner = config.feed_forward_multiplier * width
        self.activation = config.activation
        self.up_proj = ops.Linear(width, inner)
        self.down_proj = ops.Linear(inner, width, init_scale=(2 * config.num_layers) ** -0.5)
        self.dropout = ops.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.down_proj(ops.activation(self.activation, self.up_proj(x))))


class TransformerBlock(nn.Module):
    """Attention and feed-forward network, each in a residual branch."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.attention_norm = ops.LayerNorm(config.hidden_size)
        self.attention = Attention(config)
        self.feed_forward_norm = ops.LayerNorm(config.hidden_size)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: torch.Tensor, mask: str | torch.Tensor | None, cache: LayerCache | None = None
    ) -> torch.Tensor:
        if self.pre_norm:
            x = x + self.attention(self.attention_norm(x), mask, cache)
            return x + self.feed_forward(self.feed_forward_norm(x))
        x = self.attention_norm(x + self.attention(x, mask, cache))
        return self.feed_forward_norm(x + self.feed_forward(x))


class TransformerModel(BaseModel):
    """A transformer language model, or with `causal: false` an encoder."""

    config: TransformerConfig

    def __init__(self, config: TransformerConfig, seed: int | None = 0) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.token_embedding = ops.Embedding(config.vocab_size, width)
        self.register_buffer(
            "_positions", torch.from_numpy(sinusoidal_positions(config.max_seq_length, width)), persistent=False
        )
        self.embedding_dropout = ops.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        if config.norm_position == "pre":
            self.final_norm = ops.LayerNorm(width)
        if not config.tie_embeddings:
            self.output = ops.Linear(width, config.vocab_size, bias=False)
        if seed is not None:
            self.init_weights(seed)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Computes logits of tokens.

        Args:
            input_ids: Tokens, int `[B, T]`.
            attention_mask: `[B, S]`, 0 or False for padding; it includes the positions in the cache. Positions are
                counted from the first token of each row that is not padding, so padding on the left has no effect.
            cache: Keys and values of earlier tokens, which is updated. Its rows have padding on the left only.

        Returns:
            Logits `[B, T, V]`.
        """
        self.check_tokens(input_ids, attention_mask, 0 if cache is None else cache.length, cache is not None)
        return self.project(self.hidden_states(input_ids, attention_mask, cache))

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Returns the input of the output projection, `[B, T, D]`."""
        length = input_ids.shape[1]
        past = 0 if cache is None else cache.length
        if past is not None:  # in a captured step, the caller checks it
            self.check_length(past + length)
        if cache is None:
            positions, mask = ops.positions_and_mask(input_ids, attention_mask, self.config.causal)
        else:
            positions, mask = cache.begin(input_ids, attention_mask)

        x = self.token_embedding(input_ids) * self.config.hidden_size**0.5 + self._positions[positions]
        x = self.embedding_dropout(x.to(self.compute_dtype))
        for index, block in enumerate(self.blocks):
            if self.gradient_checkpointing and self.training:
                x = ops.checkpoint(block, x, mask)
            else:
                x = block(x, mask, cache.layers[index] if cache else None)
        if cache is not None:
            cache.end(length)
        return self.final_norm(x) if self.config.norm_position == "pre" else x

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns logits `[..., V]` of hidden states `[..., D]`."""
        if self.config.tie_embeddings:
            return self.token_embedding.as_linear(hidden_states)
        return self.output(hidden_states)

    def make_cache(self) -> KVCache:
        """Returns an empty cache."""
        return KVCache(len(self.blocks))
