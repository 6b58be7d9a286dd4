"""Prompts as people give them (arrays of any framework, lists of unequal length) as one checked batch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import UsageError


def batch_of(
    input_ids: Any, attention_mask: Any, pad_token_id: int, vocab_size: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_] | None]:
    """Prompts as int32 `[B, T]`, padded on the left, and which positions are real, bool `[B, T]`.

    The mask is None where every position is. Ids are checked here because MLX reads past a table without a
    word.

    Raises:
        UsageError: not integers, empty, of a wrong shape, outside the vocabulary, or ending in padding.
    """
    if not isinstance(pad_token_id, (int, np.integer)) or not 0 <= pad_token_id < vocab_size:
        raise UsageError(f"generate: pad_token_id {pad_token_id} is outside the vocabulary (0 to {vocab_size - 1})")
    if isinstance(input_ids, str) or (
        isinstance(input_ids, (list, tuple)) and any(isinstance(row, str) for row in input_ids)
    ):
        raise UsageError("generate: input_ids must be token ids; icenet.generate(model, text) takes a text")
    if isinstance(input_ids, (list, tuple)) and any(_has_length(row) for row in input_ids):
        tokens, visible = _padded([_row(row, index) for index, row in enumerate(input_ids)], pad_token_id)
    else:
        tokens = _integers(input_ids, "token ids")
        tokens = tokens[None, :] if tokens.ndim == 1 and tokens.size else tokens
        if tokens.ndim != 2 or tokens.size == 0:
            empty = ", which is empty" if tokens.ndim == 1 else ""
            raise UsageError(f"generate: input_ids must be [batch, length], not {list(tokens.shape)}{empty}")
        visible = np.ones(tokens.shape, np.bool_)
    if attention_mask is not None:
        visible = visible & _mask(attention_mask, tokens.shape)
        if not visible[:, -1].all():
            raise UsageError("generate: a prompt ends in padding; pad on the left")
    _check(tokens, vocab_size)
    return tokens.astype(np.int32), None if visible.all() else visible


def _padded(rows: list[NDArray[Any]], pad_token_id: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    length = max(len(row) for row in rows)
    tokens = np.full((len(rows), length), pad_token_id, np.int64)
    visible = np.zeros((len(rows), length), np.bool_)
    for index, row in enumerate(rows):
        tokens[index, length - len(row) :] = row
        visible[index, length - len(row) :] = True
    return tokens, visible


def _row(row: Any, index: int) -> NDArray[Any]:
    if not _has_length(row):
        raise UsageError(f"generate: prompt {index} is the number {row!r}, where the others are lists of ids")
    values = _integers(row, f"prompt {index}: token ids") if len(row) else np.zeros(0, np.int64)
    if values.ndim != 1:
        raise UsageError(f"generate: prompt {index} must be a flat list of ids, not {list(values.shape)}")
    if values.size == 0:
        raise UsageError(f"generate: prompt {index} is empty; give at least one token")
    return values


def _has_length(value: Any) -> bool:
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0


def _numpy(array: Any) -> NDArray[Any]:
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)


def _integers(array: Any, what: str) -> NDArray[Any]:
    try:
        values = _numpy(array)
    except (ValueError, TypeError):
        raise UsageError(f"generate: {what} are nested unevenly; give a flat list of integers") from None
    if values.size and not np.issubdtype(values.dtype, np.integer):
        raise UsageError(f"generate: token ids must be integers, not {values.dtype}")
    return values


def _mask(attention_mask: Any, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    try:
        mask = _numpy(attention_mask).astype(np.bool_)
    except ValueError:
        raise UsageError(f"generate: attention_mask is ragged where input_ids is {list(shape)}") from None
    if mask.shape != shape:
        raise UsageError(f"generate: attention_mask is {list(mask.shape)} where input_ids is {list(shape)}")
    return mask


def _check(tokens: NDArray[Any], vocab_size: int) -> None:
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise UsageError(
            f"generate: token {int(tokens[row, column])} at row {row}, position {column} is outside the "
            f"vocabulary (0 to {vocab_size - 1})"
        )
