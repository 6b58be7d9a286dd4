"""The output of a model for a batch, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from icenet.core.config import user_code
from icenet.core.engine.batches import Array
from icenet.core.errors import UsageError


def call_model(
    model: Callable[..., Array], arrays: Mapping[str, Array], vocab_size: int | None, as_loss: bool = False
) -> Array:
    """Returns the output of a model for a batch on the device.

    Args:
        model: The model.
        arrays: The batch.
        vocab_size: Number of logits for each label; None if the labels are not classes.
        as_loss: Return the mean loss of the labels instead, which the model computes (`computes_loss`).

    Raises:
        UsageError: The code of a user's model fails, or its output does not fit the labels.
    """
    options = {name: arrays[name] for name in ("attention_mask", *(["labels"] if as_loss else [])) if name in arrays}
    with user_code.explain_errors(arrays["inputs"]):
        output = model(arrays["inputs"], **options)
    if "labels" in arrays and vocab_size is not None and not as_loss:
        _check_output(output, list(arrays["labels"].shape), vocab_size)
    return output


def _check_output(output: Any, labels: list[int], vocab_size: int) -> None:
    """Checks that logits are floats, in the shape of the labels, with a value for each class. MLX checks neither."""
    is_array = hasattr(output, "shape") and not isinstance(output, np.ndarray)
    shape = list(output.shape) if is_array else []
    dtype = str(output.dtype).rpartition(".")[2] if is_array else ""
    if shape[:-1] != labels or shape[-1] < vocab_size or "float" not in dtype:
        given = f"has type {type(output).__name__}"
        if is_array:
            given = f"is {shape}" if "float" in dtype else f"has the dtype {dtype}"
        raise UsageError(
            f"the output of the model {given}, and for labels {labels} it must be logits {[*labels, vocab_size]} "
            "(the last number is model.vocab_size)"
        )
