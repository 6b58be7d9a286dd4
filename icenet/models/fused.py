"""The block of a transformer with fused kernels, for captured steps of few rows, MLX."""

from __future__ import annotations

from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.generation.cache import LayerCache
from icenet.generation.capture import CAPTURED_TYPES
from icenet.models.transformer import Attention, FeedForward, TransformerBlock
from icenet.nn import Mask
from icenet.nn.few_rows import gated_product, has_few_rows, product


class FusedBlock(TransformerBlock):
    """A `TransformerBlock` whose norms, activations and sums are computed by the kernels of its products."""

    def __call__(
        self,
        x: mx.array,
        mask: Mask,
        angles: mx.array | None = None,
        cache: LayerCache | None = None,
        with_scores: bool = False,
    ) -> Any:
        if with_scores or cache is None or not cache.is_captured or not has_few_rows(x):
            return super().__call__(x, mask, angles, cache, with_scores)
        first, second = self.attention_norm, self.feed_forward_norm
        if self.norm_position == "pre":
            y = attend(self.attention, x, first, x, mask, angles, cache)
            return feed_forward(self.feed_forward, x if self.parallel else y, second, y)
        if self.norm_position == "post":
            x = first(attend(self.attention, x, None, x, mask, angles, cache))
            return second(feed_forward(self.feed_forward, x, None, x))
        if self.norm_position == "branch":
            x = x + first(attend(self.attention, x, None, None, mask, angles, cache))
            return x + second(feed_forward(self.feed_forward, x, None, None))
        x = x + self.attention_post_norm(attend(self.attention, x, first, None, mask, angles, cache))
        return x + self.feed_forward_post_norm(feed_forward(self.feed_forward, x, second, None))


CAPTURED_TYPES[TransformerBlock] = FusedBlock


def attend(
    attention: nn.Module,
    x: mx.array,
    norm: nn.Module | None,
    residual: mx.array | None,
    mask: Mask,
    angles: mx.array | None,
    cache: LayerCache,
) -> mx.array:
    """Computes residual + attention(norm(x)), `[B, T, D]`, in evaluation mode."""
    if type(attention) is not Attention:
        return _called(attention, x, norm, residual, mask, angles, cache)
    joined = attention._joined
    if joined is None:
        q, k, v = attention.project(x if norm is None else norm(x))
    else:
        rows = product(joined, x, norm)
        if attention.plan.query_key_norm == "none" and cache.reads_in_place(x.shape[1]):
            mixed = cache.attend_joined(rows, angles, attention.plan)
            return product(attention.out_proj, mixed, residual=residual)
        q, k, v = mx.split(rows, joined.ends[1:-1], axis=-1)
    return product(attention.out_proj, attention.mix(q, k, v, mask, angles, cache), residual=residual)


def feed_forward(network: nn.Module, x: mx.array, norm: nn.Module | None, residual: mx.array | None) -> mx.array:
    """Computes residual + network(norm(x)), `[B, T, D]`, in evaluation mode."""
    if type(network) is not FeedForward or (network.is_gated and network._joined is None):
        return _called(network, x, norm, residual)
    if network.is_gated:
        inner = gated_product(network._joined, x, norm, network.activation)
    else:
        inner = product(network.up_proj, x, norm, network.activation)
    return product(network.down_proj, inner, residual=residual)


def _called(
    module: nn.Module, x: mx.array, norm: nn.Module | None, residual: mx.array | None, *others: Any
) -> mx.array:
    y: mx.array = module(x if norm is None else norm(x), *others)
    return y if residual is None else residual + y
