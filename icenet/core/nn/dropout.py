"""Dropout keys: how calls of a dropout layer and rows of a batch get theirs. Both backends use these functions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core import rng
from icenet.core.errors import UsageError


class KeyedCalls:
    """The part of a dropout layer that is the same on both backends: its keys and the number of its calls.

    Attributes:
        p: Probability of zero.
        training: Whether the layer is in training mode.
    """

    p: float
    training: bool
    _keys: Any
    _calls: int

    @property
    def is_active(self) -> bool:
        """Whether the layer sets any values to zero."""
        return bool(self.training and self.p > 0)

    @property
    def is_seeded(self) -> bool:
        """Whether the layer has keys."""
        return self._keys is not None

    @property
    def scale(self) -> float:
        """The factor of the values that the layer keeps: 1 / (1 - p)."""
        return 1 / (1 - self.p) if self.p < 1 else 0.0

    def seed(self, keys: Any) -> None:
        """Sets the keys of the next calls.

        Args:
            keys: Keys `[rows, 2]`, uint32 on MLX and int32 on PyTorch, or None for the framework's own generator.
        """
        self._keys = keys
        self._calls = 0

    def next_keys(self) -> Any:
        """Returns the keys `[rows, 2]` of this call; None without keys.

        A layer that a model calls several times has other keys for each call: those of the n-th one (from 0) are
        `keys ^ n`. Threefry's outputs under keys that differ in a few bits are independent.
        """
        if self._keys is None:
            return None
        call = self._calls
        self._calls = call + 1
        return self._keys ^ call if call else self._keys


@contextlib.contextmanager
def repeated_calls(dropouts: Sequence[KeyedCalls], calls: Sequence[int]) -> Iterator[None]:
    """Sets the numbers of calls while the context is open, for a computation that repeats an earlier one."""
    current = count_calls(dropouts)
    _set_calls(dropouts, calls)
    try:
        yield
    finally:
        _set_calls(dropouts, current)


def count_calls(dropouts: Sequence[KeyedCalls]) -> list[int]:
    """Returns the number of calls of each layer since its keys were set."""
    return [dropout._calls for dropout in dropouts]


def _set_calls(dropouts: Sequence[KeyedCalls], calls: Sequence[int]) -> None:
    for dropout, count in zip(dropouts, calls, strict=True):
        dropout._calls = count


def dropout_layers(modules: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the dropout layers with a probability above zero, by path, sorted.

    Args:
        modules: All modules of a model, by path. A layer that is used at several places has the first of its paths.
    """
    layers = sorted((path, module) for path, module in modules if isinstance(module, KeyedCalls) and module.p > 0)
    paths: dict[int, str] = {}
    return {path: layer for path, layer in layers if paths.setdefault(id(layer), path) == path}


def dropout_keys(seed: int, step: int, rows: range, sites: Sequence[str]) -> NDArray[np.uint32]:
    """Returns the keys of dropout layers in one training step, uint32 `[sites, rows, 2]`.

    Args:
        seed: Seed of the run.
        step: Training step.
        rows: Rows of the batch.
        sites: Paths of the layers.
    """
    by_site = rng.keys_for_names(rng.key(seed, "dropout", step), list(sites))
    return rng.fold(by_site[:, None, :], np.arange(rows.start, rows.stop, dtype=np.uint64)[None, :])


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


def check_channels(layer: str, shape: tuple[int, ...], axes: str) -> None:
    """Checks the input of a dropout layer that sets whole channels to zero.

    Args:
        layer: Name of the layer, for the message.
        shape: Shape of the input.
        axes: Names of the axes: `[B, H, W, C]`.

    Raises:
        UsageError: The input has another number of axes.
    """
    if len(shape) != axes.count(",") + 1:
        raise UsageError(f"{layer} takes an input {axes}, with the rows of the batch first; it got {list(shape)}")
