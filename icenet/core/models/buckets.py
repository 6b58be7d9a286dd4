"""Few shapes for compiled functions: a batch is padded to powers of two, so that lengths which change do not
make the compiler trace without end."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.config import ModelConfig

SHORTEST = 16


def bucket(length: int, longest: int | None = None) -> int:
    """The power of two, at least 16, that holds `length`; not above `longest`."""
    size = max(SHORTEST, 1 << (length - 1).bit_length())
    return size if longest is None else max(min(size, longest), length)


def pad(batch: dict[str, NDArray[Any]], model: ModelConfig) -> dict[str, NDArray[Any]]:
    """A batch with more rows and, for a model that reads from left to right, more positions on the right.

    Labels of what is added count for nothing. Only for evaluation: added rows would enter the statistics of a
    batch norm, and added positions would draw other dropout masks.
    """
    inputs = batch["inputs"]
    rows = 1 << (len(inputs) - 1).bit_length()
    left_to_right = getattr(model, "causal", False) or getattr(model, "bidirectional", True) is False
    extra = 0
    if inputs.ndim == 2 and left_to_right:
        extra = bucket(inputs.shape[1], getattr(model, "max_seq_length", None)) - inputs.shape[1]
    out = {}
    for name, array in batch.items():
        widths = [(0, rows - len(array))] + [(0, extra if axis == 1 and array.ndim == 2 else 0)
                                            for axis in range(1, array.ndim)]  # fmt: skip
        out[name] = np.pad(array, widths, constant_values=-100 if name == "labels" else 0)
    if "attention_mask" in batch and rows > len(inputs):
        out["attention_mask"][len(inputs) :] = 1  # a row of padding alone has nothing to look at
    return out
