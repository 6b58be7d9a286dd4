"""Sampling steps on MLX. `icenet.core.generation.sampling` documents them and applies them in order.

Logits are fp32 `[B, V]`; a dropped token has the logit -inf.
"""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.core.generation.sampling import SMALLEST_UNIFORM
from icenet.nn.random import random_uniform


def to_fp32(logits: mx.array) -> mx.array:
    """Returns logits in fp32."""
    return logits.astype(mx.float32)


def penalize_repetition(logits: mx.array, seen: mx.array, penalty: float) -> mx.array:
    """Divides positive and multiplies negative logits of seen tokens by `penalty`. `seen` is bool `[B, V]`."""
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: mx.array, top_k: int) -> mx.array:
    """Drops all but the `top_k` highest logits."""
    threshold = mx.topk(logits, top_k, axis=-1).min(axis=-1, keepdims=True)
    return mx.where(logits < threshold, -mx.inf, logits)


def keep_top_p(logits: mx.array, top_p: float) -> mx.array:
    """Drops the least likely tokens whose probabilities add up to at most 1 - `top_p`."""
    ascending = mx.sort(logits, axis=-1)
    dropped = mx.cumsum(mx.softmax(ascending, axis=-1, precise=True), axis=-1) <= 1 - top_p
    dropped[:, -1] = False  # the most likely token is always kept
    threshold = mx.where(dropped, mx.inf, ascending).min(axis=-1, keepdims=True)
    return mx.where(logits < threshold, -mx.inf, logits)


def keep_min_p(logits: mx.array, min_p: float) -> mx.array:
    """Drops tokens that are less than `min_p` times as likely as the most likely one."""
    probabilities = mx.softmax(logits, axis=-1, precise=True)
    threshold = min_p * probabilities.max(axis=-1, keepdims=True)
    return mx.where(probabilities < threshold, -mx.inf, logits)


def add_gumbel_noise(logits: mx.array, keys: mx.array) -> mx.array:
    """Adds Gumbel noise drawn under the key of each row, uint32 `[B, 2]`."""
    uniform = mx.maximum(random_uniform(keys, logits.shape[-1]), SMALLEST_UNIFORM)
    return logits - mx.log(-mx.log(uniform))
