"""Sampling steps on PyTorch. `icenet.core.generation.sampling` documents them and applies them in order.

Logits are fp32 `[B, V]`; a dropped token has the logit -inf.
"""

from __future__ import annotations

import torch

from icenet.core.generation.sampling import SMALLEST_UNIFORM
from icenet_torch.nn.random import random_uniform


def to_fp32(logits: torch.Tensor) -> torch.Tensor:
    """Returns logits in fp32."""
    return logits.to(torch.float32)


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divides positive and multiplies negative logits of seen tokens by `penalty`. `seen` is bool `[B, V]`."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Drops all but the `top_k` highest logits."""
    threshold = torch.topk(logits, top_k, dim=-1).values.amin(dim=-1, keepdim=True)
    return torch.where(logits < threshold, -torch.inf, logits)


def keep_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Drops the least likely tokens whose probabilities add up to at most 1 - `top_p`."""
    ascending = torch.sort(logits, dim=-1).values
    dropped = torch.cumsum(torch.softmax(ascending, dim=-1), dim=-1) <= 1 - top_p
    dropped[:, -1] = False  # the most likely token is always kept
    threshold = torch.where(dropped, torch.inf, ascending).amin(dim=-1, keepdim=True)
    return torch.where(logits < threshold, -torch.inf, logits)


def keep_min_p(logits: torch.Tensor, min_p: float) -> torch.Tensor:
    """Drops tokens that are less than `min_p` times as likely as the most likely one."""
    probabilities = torch.softmax(logits, dim=-1)
    threshold = min_p * probabilities.amax(dim=-1, keepdim=True)
    return torch.where(probabilities < threshold, -torch.inf, logits)


def add_gumbel_noise(logits: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Adds Gumbel noise drawn under the key of each row, int32 `[B, 2]`."""
    uniform = random_uniform(keys, logits.shape[-1]).clamp_(min=SMALLEST_UNIFORM)
    return logits - torch.log(-torch.log(uniform))
