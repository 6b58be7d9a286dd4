"""The loss and the count of right answers, PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from icenet_torch.nn.arrays import Array, is_half


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """The mean cross-entropy in nats, fp32 (fp64 of fp64 logits), and the number of labels counted.

    logits `[..., V]`; labels int `[...]`, where a negative label counts for nothing. The mean is taken twice,
    the second time of what is left over: a single sum of a thousand losses is off by several roundings.
    """
    counted = (labels >= 0).flatten()
    logits = logits.float() if is_half(logits) else logits
    if logits.is_cuda:  # which sums by halves: nothing is left over, and a small step is bound by its kernels' number
        count, wanted = counted.sum(), torch.where(counted, labels.flatten(), -100).long()
        return F.cross_entropy(logits.flatten(0, -2), wanted, reduction="sum") / count.clamp(min=1), count
    losses = F.cross_entropy(
        logits.flatten(0, -2), torch.where(counted, labels.flatten(), 0).long(), reduction="none"
    )
    count = counted.sum()
    share = counted.to(losses.dtype) / count.clamp(min=1)
    rough = (losses * share).sum().detach()
    return rough + ((losses - rough) * share).sum(), count


def count_correct(logits: Array, labels: Array) -> Array:
    """How many rows of logits `[B, V]` are largest at their label."""
    return (logits.argmax(dim=-1) == labels).sum()
