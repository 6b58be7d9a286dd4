"""Pads batches to a few shapes, because a compiled function is traced again for each new shape."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.config import ModelConfig

MIN_LENGTH = 16


def bucket(length: int, longest: int | None = None) -> int:
    """Returns the smallest power of two that is at least `length` and `MIN_LENGTH`, limited to `longest`."""
    size = max(MIN_LENGTH, 1 << (length - 1).bit_length())
    return size if longest is None else max(min(size, longest), length)


def pad(batch: dict[str, NDArray[Any]], model: ModelConfig) -> dict[str, NDArray[Any]]:
    """Pads a batch to a power of two of rows and, for a causal model, to a bucket of positions on the right.

    Positions are not added if their rotary scaling depends on the number of tokens.

    Padding has the label -100, which is ignored. Use it for evaluation only: in training, padding would change the
    statistics of batch norm and the dropout masks.

    Args:
        batch: Arrays `inputs` and `labels`, and optionally `attention_mask`.
        model: The model section of the configuration.
    """
    inputs = batch["inputs"]
    extra_rows = (1 << (len(inputs) - 1).bit_length()) - len(inputs)
    is_causal = getattr(model, "causal", False) or not getattr(model, "bidirectional", True)
    extra_length = 0
    # the angles of these positions depend on the number of tokens, which padding without a mask would change
    scaling = getattr(model, "rotary_scaling", None)
    if inputs.ndim == 2 and is_causal and (scaling is None or scaling.type not in ("dynamic", "longrope")):
        extra_length = bucket(inputs.shape[1], getattr(model, "max_seq_length", None)) - inputs.shape[1]
    padded = {}
    for name, array in batch.items():
        widths = [(0, extra_rows)] + [(0, 0)] * (array.ndim - 1)
        if array.ndim == 2:
            widths[1] = (0, extra_length)
        padded[name] = np.pad(array, widths, constant_values=-100 if name == "labels" else 0)
    if "attention_mask" in padded:
        padded["attention_mask"][len(inputs) :] = 1  # a row of padding only would have no key to attend to
    return padded
