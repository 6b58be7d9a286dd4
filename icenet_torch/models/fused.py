"""The block of a transformer with fused kernels, for captured steps of few rows, PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from icenet_torch.generation.cache import LayerCache
from icenet_torch.generation.capture import CAPTURED_TYPES
from icenet_torch.models.transformer import Attention, FeedForward, TransformerBlock
from icenet_torch.nn import Mask
from icenet_torch.nn.few_rows import gated_product, has_few_rows, product


class FusedBlock(TransformerBlock):
    """A `TransformerBlock` whose norms, activations and sums are computed by the kernels of its products."""

    def forward(
        self,
        x: torch.Tensor,
        mask: Mask,
        angles: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        with_scores: bool = False,
    ) -> Any:
        if with_scores or cache is None or not cache.is_captured or not has_few_rows(x):
            return super().forward(x, mask, angles, cache, with_scores)
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
    x: torch.Tensor,
    norm: nn.Module | None,
    residual: torch.Tensor | None,
    mask: Mask,
    angles: torch.Tensor | None,
    cache: LayerCache,
) -> torch.Tensor:
    """Computes residual + attention(norm(x)), `[B, T, D]`, in evaluation mode."""
    if type(attention) is not Attention or _has_hooks(attention):
        return _called(attention, x, norm, residual, mask, angles, cache)
    joined = attention._joined
    if joined is None:
        q, k, v = attention.project(x if norm is None else norm(x))
    else:
        rows = product(joined, x, norm)
        if attention.plan.query_key_norm == "none" and cache.reads_in_place(x.shape[1]):
            mixed = cache.attend_joined(rows, angles, attention.plan)
            return product(attention.out_proj, mixed, residual=residual)
        q, k, v = rows.split(joined.sizes, dim=-1)
    return product(attention.out_proj, attention.mix(q, k, v, mask, angles, cache), residual=residual)


def feed_forward(
    network: nn.Module, x: torch.Tensor, norm: nn.Module | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """Computes residual + network(norm(x)), `[B, T, D]`, in evaluation mode."""
    if type(network) is not FeedForward or _has_hooks(network) or (network.is_gated and network._joined is None):
        return _called(network, x, norm, residual)
    if network.is_gated:
        inner = gated_product(network._joined, x, norm, network.activation)
    else:
        inner = product(network.up_proj, x, norm, network.activation)
    return product(network.down_proj, inner, residual=residual)


def _called(
    module: nn.Module, x: torch.Tensor, norm: nn.Module | None, residual: torch.Tensor | None, *others: Any
) -> torch.Tensor:
    y: torch.Tensor = module(x if norm is None else norm(x), *others)
    return y if residual is None else residual + y


def _has_hooks(module: nn.Module) -> bool:
    """Returns whether a user's hooks see the calls of a module or of one inside it."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
