"""The transformer (Vaswani et al., "Attention is all you need", 2017) and its variants, PyTorch.

    tokens -> embedding * scale + positions -> N x [attention, feed-forward] -> vocabulary

Each option of the configuration is described in docs/models.md. Shapes: B batch, T new positions, S all positions
(those in the cache and T), H heads of queries, K heads of keys and values, D hidden_size, E head_size,
F feed-forward width, V vocab_size. The mirror is `icenet/models/transformer.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from icenet.core.config import TransformerConfig, transformer_plan
from icenet.core.config.transformer_plan import AttentionPlan, BlockPlan, ExpertsPlan, FeedForwardPlan, LayerType
from icenet.core.models.init import sinusoidal_rows
from icenet.core.nn.relative_positions import distance_buckets
from icenet.core.nn.router_scores import RouterScores
from icenet_torch import nn as ops
from icenet_torch.generation.cache import KVCache, LayerCache
from icenet_torch.models.base import BaseModel


class Attention(nn.Module):
    """Multi-head scaled dot-product attention. Groups of heads of queries share a head of keys and values."""

    joined_layers = "q_proj", "k_proj", "v_proj"
    """Layers that generation computes as one product."""

    def __init__(self, plan: AttentionPlan) -> None:
        super().__init__()
        self.plan = plan
        queries, keys = plan.num_heads * plan.head_size, plan.num_kv_heads * plan.head_size
        self.q_proj = ops.Linear(plan.width, queries, plan.bias)
        self.k_proj = ops.Linear(plan.width, keys, plan.bias)
        self.v_proj = ops.Linear(plan.width, keys, plan.bias)
        self._joined: ops.Projections | None = None  # these three in one, for generation
        self.out_proj = ops.Linear(queries, plan.width, plan.output_bias, plan.init_scale)
        if plan.query_key_norm != "none":
            per_head = plan.query_key_norm == "head"
            self.q_norm = ops.make_norm(plan.norm, plan.head_size if per_head else queries)
            self.k_norm = ops.make_norm(plan.norm, plan.head_size if per_head else keys)
        self.dropout = ops.Dropout(plan.dropout)

    def forward(
        self,
        x: torch.Tensor,
        mask: ops.Mask,
        angles: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        mixed = self.mix(*self.project(x), mask, angles, cache)
        return self.dropout(self.out_proj(mixed))

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: ops.Mask,
        angles: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """Returns the values that the queries attend to, `[B, T, H * E]`."""
        plan, shape = self.plan, q.shape
        if plan.query_key_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)
        if plan.query_key_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            mixed = cache.attend(q, k, v, mask, angles, plan)  # [B, H, T, E]
        else:
            if angles is not None:
                q, k = ops.rotate(q, angles, plan.rotary_pairs), ops.rotate(k, angles, plan.rotary_pairs)
            mixed = ops.scaled_dot_product_attention(q, k, v, mask, plan.scale, plan.softcap)
        return (mixed if shape[1] == 1 else mixed.swapaxes(1, 2)).reshape(shape)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns queries, keys and values, `[B, T, H * E]` and twice `[B, T, K * E]`."""
        if self._joined is not None:
            q, k, v = self._joined(x)
            return q, k, v
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def prepare_generation(self, original: Attention, dtype: ops.Dtype) -> None:
        """See `icenet.core.generation.copies`."""
        self._joined = ops.join([getattr(original, name) for name in self.joined_layers], dtype)
        if self._joined is not None:
            self.q_proj = self.k_proj = self.v_proj = None  # type: ignore[assignment]

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `[B, T, H * E]` as `[B, H, T, E]`."""
        batch, length, _ = x.shape
        if length == 1:  # one operation: starting them is most of the time of a token of a small model
            return x.reshape(batch, -1, 1, self.plan.head_size)
        return x.reshape(batch, length, -1, self.plan.head_size).swapaxes(1, 2)


class FeedForward(nn.Module):
    """A feed-forward network: down(activation(up(x))), or gated: down(activation(gate(x)) * up(x))."""

    joined_layers = "gate_proj", "up_proj"  # as in `Attention`, if it is gated

    def __init__(self, plan: FeedForwardPlan) -> None:
        super().__init__()
        self.activation = plan.activation
        if plan.is_gated:
            self.gate_proj = ops.Linear(plan.width, plan.inner, plan.bias)
        self.up_proj = ops.Linear(plan.width, plan.inner, plan.bias)
        self.down_proj = ops.Linear(plan.inner, plan.width, plan.bias, plan.init_scale)
        self._joined: ops.Projections | None = None  # gate and up in one, for generation
        self.is_gated = plan.is_gated
        self.dropout = ops.Dropout(plan.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_gated:
            gate, up = self.project(x)
            inner = ops.gated_activation(self.activation, gate, up)
        else:
            inner = ops.activation(self.activation, self.up_proj(x))
        return self.dropout(self.down_proj(inner))

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the gate and what it multiplies, `[B, T, F]` each."""
        if self._joined is not None:
            gate, up = self._joined(x)
            return gate, up
        return self.gate_proj(x), self.up_proj(x)

    def prepare_generation(self, original: FeedForward, dtype: ops.Dtype) -> None:
        """See `icenet.core.generation.copies`."""
        layers = [getattr(original, name) for name in self.joined_layers] if self.is_gated else []
        self._joined = ops.join(layers, dtype) if layers else None
        if self._joined is not None:
            self.gate_proj = self.up_proj = None  # type: ignore[assignment]


class MixtureOfExperts(nn.Module):
    """A router and experts. The output of each token is the weighted sum of those of the experts that it chooses."""

    def __init__(self, plan: FeedForwardPlan, experts: ExpertsPlan) -> None:
        super().__init__()
        self.plan = experts
        self.router = ops.Router(plan.width, experts.total)
        self.experts = ops.Experts(plan, experts)
        self.dropout = ops.Dropout(plan.dropout)

    def forward(self, x: torch.Tensor, with_scores: bool = False) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        scores = self.router(x)
        weights, indices = ops.route(scores, self.plan)  # [B, T, experts of a token]
        output = self.dropout(self.experts(x, weights, indices))
        return (output, scores) if with_scores else output


class TransformerBlock(nn.Module):
    """Attention and feed-forward network, each in a residual branch."""

    def __init__(self, plan: BlockPlan) -> None:
        super().__init__()
        width = plan.attention.width
        self.norm_position = plan.norm_position
        self.parallel = plan.parallel
        self.window = plan.attention.window
        self.rotary = plan.attention.rotary
        self.attention_norm = ops.make_norm(plan.norm, width)
        self.attention = Attention(plan.attention)
        self.feed_forward_norm = ops.make_norm(plan.norm, width)
        experts = plan.feed_forward.experts
        self.has_experts = experts is not None
        self.feed_forward: Any = (
            MixtureOfExperts(plan.feed_forward, experts) if experts else FeedForward(plan.feed_forward)
        )
        if plan.norm_position == "sandwich":
            self.attention_post_norm = ops.make_norm(plan.norm, width)
            self.feed_forward_post_norm = ops.make_norm(plan.norm, width)

    def forward(
        self,
        x: torch.Tensor,
        mask: ops.Mask,
        angles: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        with_scores: bool = False,
    ) -> Any:
        """Returns the output, and `with_scores` also those of the router of its experts."""
        position = self.norm_position
        if self.parallel:
            normed = self.feed_forward_norm(x)
            x = x + self.attention(self.attention_norm(x), mask, angles, cache)
        elif position == "pre":
            x = x + self.attention(self.attention_norm(x), mask, angles, cache)
            normed = self.feed_forward_norm(x)
        elif position == "post":
            x = normed = self.attention_norm(x + self.attention(x, mask, angles, cache))
        elif position == "branch":
            x = normed = x + self.attention_norm(self.attention(x, mask, angles, cache))
        else:
            x = x + self.attention_post_norm(self.attention(self.attention_norm(x), mask, angles, cache))
            normed = self.feed_forward_norm(x)
        inner, scores = self.feed_forward(normed, True) if with_scores else (self.feed_forward(normed), None)
        if position == "post":
            x = self.feed_forward_norm(x + inner)
        elif position == "branch":
            x = x + self.feed_forward_norm(inner)
        else:
            x = x + (self.feed_forward_post_norm(inner) if position == "sandwich" else inner)
        return (x, scores) if with_scores else x


class TransformerModel(BaseModel):
    """A transformer language model, or with `causal: false` an encoder."""

    config: TransformerConfig

    def __init__(self, config: TransformerConfig, seed: int | None = 0) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.token_embedding = ops.Embedding(config.vocab_size, width)
        if config.positions == "learned":
            self.position_embedding = ops.Embedding(config.max_seq_length + config.position_offset, width)
        elif config.positions == "sinusoidal":
            self._positions = ops.PositionTable(partial(sinusoidal_rows, width), config.max_seq_length)
        elif config.positions == "rotary":
            self._rotary = ops.RotaryPositions(transformer_plan.rotary_plans(config), config.max_seq_length)
        if config.token_types:
            self.token_type_embedding = ops.Embedding(config.token_types, width)
        if config.embedding_norm:
            self.embedding_norm = ops.make_norm(transformer_plan.norm(config), width)
        self.embedding_dropout = ops.Dropout(config.dropout)
        if config.relative_buckets is not None:
            self.relative_bias = ops.Embedding(config.relative_buckets, config.num_heads)
            self.relative_bias.can_quantize = False
            buckets = distance_buckets(config.max_seq_length, config.relative_buckets, config.relative_max_distance)
            self.register_buffer("_distance_buckets", torch.from_numpy(buckets), persistent=False)
        self.blocks = nn.ModuleList(TransformerBlock(plan) for plan in transformer_plan.blocks(config))
        self._router_scores = RouterScores()
        if config.norm_position != "post":
            self.final_norm = ops.make_norm(transformer_plan.norm(config), width)
        if config.output == "transform":
            self.output_dense = ops.Linear(width, width)
            self.output_norm = ops.make_norm(transformer_plan.norm(config), width)
        self.computes_loss = config.output != "none"
        if config.output != "none" and not config.tie_embeddings:
            self.output = ops.Linear(width, config.vocab_size, bias=config.output_bias)
        elif config.output_bias:
            self.output = ops.Bias(config.vocab_size)
        if seed is not None:
            self.init_weights(seed)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes logits of tokens, or with `output: none` their hidden states, or the loss of labels.

        Args:
            input_ids: Tokens, int `[B, T]`.
            attention_mask: `[B, S]`, 0 or False for padding; it includes the positions in the cache. Positions are
                counted from the first token of each row that is not padding, so padding on the left has no effect.
            cache: Keys and values of earlier tokens, which is updated. Its rows have padding on the left only.
            token_type_ids: Types of the tokens, int `[B, T]`; None is type 0.
            labels: int `[B, T]`; negative labels are ignored.

        Returns:
            Logits `[B, T, V]`, or hidden states `[B, T, D]`. With labels their mean cross-entropy, fp32: not all
            logits are in memory together.
        """
        self.check_tokens(input_ids, attention_mask, 0 if cache is None else cache.length, cache is not None)
        self.check_token_types(token_type_ids, input_ids)
        hidden = self.hidden_states(input_ids, attention_mask, cache, token_type_ids)
        if labels is not None:
            return self.loss(hidden, labels)
        return hidden if self.config.output == "none" else self.project(hidden)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the input of the output projection, `[B, T, D]`."""
        length = input_ids.shape[1]
        past = 0 if cache is None else cache.length
        if past is not None:  # in a captured step, the caller checks it
            self.check_length(past + length)
            self.reserve_positions(past + length)
        windows = {block.window for block in self.blocks}
        if cache is None:
            positions, masks = ops.positions_and_masks(input_ids, attention_mask, self.config.causal, windows)
        else:
            positions, masks = cache.begin(input_ids, attention_mask, windows)
        if self.config.relative_buckets is not None:
            masks = {window: ops.biased_mask(mask, self.relative_scores(length)) for window, mask in masks.items()}

        x = self.embed(input_ids, positions, token_type_ids)
        angles = self.rotary_angles(positions, None if cache is None else cache.row_lengths)
        scores: list[torch.Tensor] = []
        for index, block in enumerate(self.blocks):
            is_balanced = self.balances_experts and block.has_experts
            inputs = x, masks[block.window], angles[block.rotary], cache.layers[index] if cache else None, is_balanced
            if self.gradient_checkpointing and self.training:
                x = ops.checkpoint(block, *inputs)
            else:
                x = block(*inputs)
            if is_balanced:
                x, found = x
                scores.append(found)
            if length > 1 and not self.training:
                ops.start(x)
        self._router_scores.keep(scores)
        if cache is not None:
            cache.end(length)
        return self.final_norm(x) if self.config.norm_position != "post" else x

    def embed(
        self, input_ids: torch.Tensor, positions: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the input of the first block, `[B, T, D]`."""
        scale = self.config.embedding_scale or self.config.hidden_size**0.5
        x = self.token_embedding(input_ids)
        if scale != 1:  # the multiplication would be a kernel of its own
            x = x * scale
        if self.config.token_types:
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type_embedding(types)
        if self.config.positions == "learned":
            x = x + self.position_embedding(positions + self.config.position_offset)
        elif self.config.positions == "sinusoidal":
            x = x + self._positions[positions]
        x = self.embedding_norm(x) if self.config.embedding_norm else x
        return self.embedding_dropout(x.to(self.compute_dtype))

    def relative_scores(self, length: int) -> torch.Tensor:
        """Returns what is added to the attention scores, `[1, H, T, T]`."""
        scores = self.relative_bias(ops.by_distance(self._distance_buckets, length))  # [T, T, H]
        return scores.swapaxes(0, 2).swapaxes(1, 2)[None]

    def rotary_angles(
        self, positions: torch.Tensor, row_lengths: torch.Tensor | None = None
    ) -> dict[LayerType | None, torch.Tensor | None]:
        """Returns cosines and sines for `ops.rotate`, for each type of layers; None for layers without rotation.

        Args:
            positions: Position of each token in its row, int `[T]` or `[B, T]`.
            row_lengths: Number of tokens of each row, int `[B, 1]`; None if these tokens are its last ones.
        """
        if self.config.positions != "rotary":
            return {None: None}
        return self._rotary.angles(positions, positions[..., -1:] + 1 if row_lengths is None else row_lengths)

    @property
    def balances_experts(self) -> bool:
        """Whether a forward pass keeps the scores of routers for `auxiliary_loss`."""
        return self.training and self.config.router_aux_loss_coef > 0

    def auxiliary_loss(self, attention_mask: torch.Tensor | None = None) -> torch.Tensor | None:
        scores = self._router_scores.take()
        plan = next((block.feed_forward.plan for block in self.blocks if block.has_experts), None)
        if not scores or plan is None:
            return None
        return self.config.router_aux_loss_coef * ops.balance_loss(scores, plan, attention_mask)

    @property
    def rereads_above(self) -> int | None:
        """Number of tokens in a row above which the cache must be made again, as with long-rope; None: never."""
        return self._rotary.switch if self.config.positions == "rotary" else None

    @property
    def cpu_prefill_columns(self) -> int:
        """See `icenet.core.models.interface`."""
        return ops.cpu_prefill_columns(self)

    def reserve_positions(self, length: int) -> None:
        """Makes the tables of positions for sequences of `length` tokens, before a step that is captured."""
        if self.config.positions in ("sinusoidal", "rotary"):
            table = self._rotary if self.config.positions == "rotary" else self._positions
            table.reserve(min(length, self.config.max_seq_length))

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns logits `[..., V]` of hidden states `[..., D]`."""
        hidden_states = self.transform(hidden_states)
        if self.config.tie_embeddings:
            logits = self.token_embedding.as_linear(hidden_states)
            logits = self.output(logits) if self.config.output_bias else logits
        else:
            logits = self.output(hidden_states)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the input of the last linear layer, `[..., D]`."""
        if self.config.output != "transform":
            return hidden_states
        return self.output_norm(ops.activation(self.config.activation, self.output_dense(hidden_states)))

    def loss(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross-entropy of labels `[...]`, fp32, from hidden states `[..., D]`."""
        layer = self.token_embedding if self.config.tie_embeddings else self.output
        if type(layer) not in (ops.Linear, ops.Embedding):  # a layer that a user put there
            return ops.cross_entropy(self.project(hidden_states), labels)[0]
        bias = self.output.bias if self.config.output_bias else None
        cap = self.config.logit_softcap
        return ops.linear_cross_entropy(self.transform(hidden_states), layer.weight, bias, labels, cap)

    def make_cache(self) -> KVCache:
        """Returns an empty cache."""
        return KVCache(len(self.blocks), self.reserve_positions)
