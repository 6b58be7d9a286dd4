"""Loss and accuracy, PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from icenet_torch.nn import exact
from icenet_torch.nn.arrays import Array, is_half


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Returns the mean cross-entropy in nats, fp32 (fp64 for fp64 logits), and the number of labels that count.

    Args:
        logits: `[..., V]`.
        labels: int `[...]`; negative labels are ignored.
    """
    counted = (labels >= 0).flatten()
    logits = (logits.float() if is_half(logits) else logits).flatten(0, -2)
    count = counted.sum()
    if logits.is_cuda:  # CUDA sums pairwise, which is accurate in one pass; fewer kernels make small steps faster
        targets = torch.where(counted, labels.flatten(), -100).long()
        return F.cross_entropy(logits, targets, reduction="sum") / count.clamp(min=1), count
    losses = F.cross_entropy(logits, torch.where(counted, labels.flatten(), 0).long(), reduction="none")
    return exact.weighted_mean(losses, counted.to(losses.dtype) / count.clamp(min=1)), count


def count_correct(logits: Array, labels: Array) -> Array:
    """Returns the number of rows of logits `[B, V]` with the maximum at their label, labels `[B]`."""
    return (logits.argmax(dim=-1) == labels).sum()
