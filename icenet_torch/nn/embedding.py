"""Embeddings that check their ids, PyTorch.

PyTorch refuses an id outside a table by itself, on a CPU with an error that names neither the layer nor the id.
`guard_embeddings` makes the embeddings in a model name both.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn

from icenet.core.nn import embedding
from icenet_torch.nn.arrays import Array, to_numpy


class CheckedEmbedding(embedding.CheckedIds, nn.Embedding):
    """An embedding that checks its ids after `guard_embeddings`."""

    def forward(self, ids: Any) -> Array:
        if self._path is None or torch.compiler.is_compiling() or not isinstance(ids, torch.Tensor):
            return super().forward(ids)
        self.check_ids(ids, self.num_embeddings, to_host)
        try:
            return super().forward(ids)
        except IndexError:
            self._shapes.discard(tuple(ids.shape))
            self.check_ids(ids, self.num_embeddings, to_host)
            raise


class Embedding(CheckedEmbedding):
    """The class of PyTorch's own embeddings after `guard_embeddings`."""


_CHECKED: dict[type, type] = {nn.Embedding: Embedding}


def guard_embeddings(modules: Iterable[tuple[str, nn.Module]], reads_all: bool = False) -> None:
    """Makes the embeddings in a model, PyTorch's and IceNet's, check their ids; see `core.nn.embedding.guard`."""
    embedding.guard(modules, _CHECKED, reads_all)


def reading_ids(modules: Iterable[tuple[str, nn.Module]]) -> AbstractContextManager[None]:
    """Returns a context in which the embeddings in any module check the ids of each call on the host."""
    return embedding.reading(modules, _CHECKED)


def to_host(tensor: torch.Tensor, waits: bool = False) -> np.ndarray | None:
    """Returns a tensor as numpy, or None if its values are unknown or, unless `waits` is set, on CUDA.

    PyTorch checks ids on CUDA itself.
    """
    if torch.compiler.is_compiling() or tensor.is_meta or (tensor.is_cuda and not waits):
        return None
    try:
        return to_numpy(tensor)
    except RuntimeError:  # in a function that torch.func transforms
        return None
