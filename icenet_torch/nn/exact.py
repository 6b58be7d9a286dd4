"""Operations written for numerical accuracy, PyTorch. The layers call them; each docstring gives the reason."""

from __future__ import annotations

import torch

from icenet_torch.nn.arrays import Array


def weighted_mean(values: Array, weights: Array) -> Array:
    """Returns the sum of values times weights, where the weights add up to 1.

    The mean is taken in two passes, the second over the differences from the first. A single fp32 sum of a thousand
    losses is off by several units in the last place.
    """
    mean = (values * weights).sum().detach()
    return mean + ((values - mean) * weights).sum()


def gradient_norms(gradients: list[Array]) -> tuple[Array, Array]:
    """Returns the Euclidean norm of all gradients together, fp32 `[]`, and of each one, fp32 `[N]`.

    fp64 gradients have fp64 norms.
    """
    norms = torch.stack(torch._foreach_norm(gradients))  # as in torch.nn.utils.get_total_norm
    return torch.linalg.vector_norm(norms), norms
