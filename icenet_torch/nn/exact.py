"""Sums that need care to be exact to the last bits, PyTorch."""

from __future__ import annotations

import torch
import torch.utils.checkpoint

from icenet_torch.nn.arrays import Array


def gradient_norms(gradients: list[Array]) -> tuple[Array, Array]:
    """The Euclidean norm of all gradients together, and of each, `[N]`; fp32 (fp64 of a reference)."""
    norms = torch.stack(torch._foreach_norm(gradients))  # as torch.nn.utils.get_total_norm does
    return torch.linalg.vector_norm(norms), norms
