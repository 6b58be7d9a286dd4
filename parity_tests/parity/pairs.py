"""Inputs and weights for pairs of modules of MLX and PyTorch, and what a planted fault is."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.nn as M
import numpy as np
import torch
import torch.nn as T

from icenet.core.models.modules import get_weights, set_weights


class Fault(NamedTuple):
    """A planted fault.

    Attributes:
        model, name: The model of `PAIRS`, and the name that its function takes.
        path: Path of the module that differs.
        cause: Words of the cause that the tool must name, separated by `|`; empty if none is known.
        kind: The kind of fault, for the count.
    """

    model: str
    name: str
    path: str
    cause: str = ""
    kind: str = ""


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def tokens(*shape: int, below: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, shape).astype(np.int32)


def randomized(theirs: T.Module, seed: int = 0) -> None:
    """Draws all parameters and running statistics of a PyTorch model, also those that begin as 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            is_scale = p.ndim == 1 and name.endswith("weight")
            p.copy_(1 + 0.2 * noise if is_scale else noise * (0.2 if p.ndim == 1 else 1 / math.sqrt(p[0].numel())))
        for name, b in theirs.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.1 * torch.randn(b.shape, generator=generator))
            if name.endswith("running_var"):
                b.copy_(1 + 0.3 * torch.rand(b.shape, generator=generator))


def with_equal_weights(ours: M.Module, theirs: T.Module, seed: int = 0) -> tuple[Any, Any]:
    randomized(theirs, seed)
    weights = get_weights(theirs)
    own = get_weights(ours)
    set_weights(ours, {name: weights.get(name, array) for name, array in own.items()})
    return ours, theirs
