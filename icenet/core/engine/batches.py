"""Batches of training: their labels, their checks, and how they are split into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icenet.core.distributed import processes
from icenet.core.errors import DataError
from icenet.core.generation.prompts import check_mask

Batch = dict[str, NDArray[Any]]
"""`inputs` and `labels`, and `attention_mask` for padded sequences.

Tokens: inputs and labels int32 `[B, T]`. Images: inputs float32 `[B, H, W, C]`, or uint8 with `Engine.pixel_scale`,
labels int32 `[B]`. A negative label is ignored.
"""

Array = Any
"""An array of the backend: `mlx.core.array` or `torch.Tensor`."""


class MicroBatch(NamedTuple):
    """The part of a training batch that one forward and backward pass computes."""

    arrays: dict[str, Array]
    """The batch on the device."""
    dropout_keys: Array | None
    """Dropout keys `[sites, rows, 2]`; None if the framework's own generator draws the masks."""
    share: float
    """Its part of the batch's counted labels. Losses weighted by their shares add up to the batch's mean loss."""
    is_last: bool
    """Whether it is the last one of this process."""


def micro_batches(batch: Batch, number: int, rank: int = 0, size: int = 1) -> list[tuple[Batch, range, float]]:
    """Splits a process's rows of a batch into consecutive micro-batches.

    Returns:
        For each micro-batch: its arrays, its rows in the batch, and its share of the batch's counted labels. The mean
        losses of all micro-batches of all processes, weighted by their shares, add up to the batch's mean loss.
    """
    own = processes.local_rows(len(batch["labels"]), rank, size)
    if number == size == 1:
        return [(batch, own, 1.0)]
    counted = max(count_labels(batch["labels"]), 1)
    edges = [own.start + len(own) * index // number for index in range(number + 1)]
    parts = []
    for start, end in pairwise(edges):
        part = {name: array[start:end] for name, array in batch.items()}
        parts.append((part, range(start, end), count_labels(part["labels"]) / counted))
    return parts


def count_labels(labels: NDArray[Any]) -> int:
    """Returns how many labels a mean loss is over: integers that are not negative, or rows of numbers but NaN."""
    if labels.dtype.kind in "iu":
        return int((labels >= 0).sum())
    return int(np.isfinite(labels).reshape(len(labels), -1).any(axis=1).sum())


def labelled_rows(batch: Batch, count: int) -> Batch:
    """Returns rows of a batch that have counted labels, repeated to `count` rows; nothing if there are none."""
    labels = batch["labels"].reshape(len(batch["labels"]), -1)
    rows = np.flatnonzero((labels >= 0 if labels.dtype.kind in "iu" else np.isfinite(labels)).any(axis=1))
    return {name: array[np.resize(rows, count)] for name, array in batch.items()} if len(rows) else {}


def check_ids(batch: Batch, vocab_size: int, names: Sequence[str] = ("inputs", "labels")) -> None:
    """Checks that token and class ids are inside the vocabulary, because MLX does not check index bounds.

    Raises:
        DataError: An id is outside; negative labels are allowed.
        UsageError: The attention mask has other values than 0 and 1.
    """
    if "attention_mask" in batch:
        check_mask(batch["attention_mask"], "attention_mask")
    for name, array in batch.items():
        if array.size and np.issubdtype(array.dtype, np.integer) and name in names:
            least, most = int(array.min()), int(array.max())
            if most >= vocab_size or (name == "inputs" and least < 0):
                wrong = most if most >= vocab_size else least
                raise DataError(
                    f"{name} contain the id {wrong}, outside the vocabulary (0 to {vocab_size - 1}); "
                    "raise model.vocab_size or change data.tokenizer"
                )
