"""Dropout keys: how the rows of a batch share the keys of one dropout layer. Both backends use these functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def seed_dropouts(dropouts: Iterable[Any], keys: Any) -> None:
    """Sets the keys of dropout layers.

    Args:
        dropouts: Dropout layers, in the order of `ModelBase.dropout_layers`.
        keys: Keys `[layers, rows, 2]`, a native array of the backend, or None for the framework's own generator.
    """
    for index, dropout in enumerate(dropouts):
        dropout.seed(None if keys is None else keys[index])


def keys_for_rows(keys: Any, shape: tuple[int, ...]) -> Any:
    """Returns the keys for an array of `shape`: one for each group of rows.

    If the first axis is not a multiple of the number of keys, it does not hold the rows of the batch, and the array
    uses the first key alone.
    """
    return keys if shape[0] % keys.shape[0] == 0 else keys[:1]
