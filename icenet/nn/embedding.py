"""Embeddings that check their ids, MLX.

MLX does not check indices: an id outside a table reads other memory, and writes to it in the backward pass.
`guard_embeddings` makes the embeddings in a model check their ids. Their results stay the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from icenet.core.nn import embedding
from icenet.nn.arrays import Array, to_numpy


class CheckedEmbedding(embedding.CheckedIds, nn.Embedding):
    """An embedding that checks its ids after `guard_embeddings`.

    An id that is outside and that the host has not read gives NaN, so that the result of the model is not finite.
    """

    def __call__(self, ids: Any) -> Array:
        ids = mx.array(ids) if isinstance(ids, (int, list)) else ids
        if self._path is None or not isinstance(ids, mx.array) or not mx.issubdtype(ids.dtype, mx.integer):
            return super().__call__(ids)
        rows = self.weight.shape[0]
        self.check_ids(ids, rows, to_host)
        if ids.dtype != mx.uint64:  # as unsigned, a negative id is too large
            ids = ids.view(mx.uint64) if ids.dtype == mx.int64 else ids.astype(mx.int32).view(mx.uint32)
        # x + -0.0 is x to the bit, and its gradient needs no further operation
        added = mx.where(ids < rows, -0.0, math.nan).astype(self.weight.dtype)
        return super().__call__(mx.minimum(ids, rows - 1)) + mx.expand_dims(added, -1)


class Embedding(CheckedEmbedding):
    """The class of MLX's own embeddings after `guard_embeddings`."""


_CHECKED: dict[type, type] = {nn.Embedding: Embedding}


def guard_embeddings(modules: Iterable[tuple[str, nn.Module]], reads_all: bool = False) -> None:
    """Makes the embeddings in a model, MLX's and IceNet's, check their ids; see `core.nn.embedding.guard`."""
    embedding.guard(modules, _CHECKED, reads_all)


def reading_ids(modules: Iterable[tuple[str, nn.Module]]) -> AbstractContextManager[None]:
    """Returns a context in which the embeddings in any module check the ids of each call on the host."""
    return embedding.reading(modules, _CHECKED)


def to_host(array: mx.array) -> np.ndarray | None:
    """Returns an array as numpy, or None if its values are unknown."""
    try:
        return to_numpy(array)
    except (RuntimeError, ValueError):  # in a function that mx.compile or mx.vmap traces
        return None
