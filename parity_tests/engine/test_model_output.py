"""The output of a user's model that is not logits: one line on both backends, before a loss is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import both_backends, is_one_line

from icenet.core.engine import call_model
from icenet.core.errors import UsageError

SHAPE = (2, 3, 5)
NOT_LOGITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "booleans": (lambda logits: logits > 0, "bool"),
    "classes": (
        lambda logits: (logits * 0).astype(mx.int32) if isinstance(logits, mx.array) else logits.int(),
        "int32",
    ),
    "a numpy array": (lambda logits: np.zeros(SHAPE, np.float32), "ndarray"),
    "a tuple": (lambda logits: (logits, None), "tuple"),
    "the last token": (lambda logits: logits[:, -1], "[2, 5]"),
    "few classes": (lambda logits: logits[..., :4], "[2, 3, 4]"),
    "a number": (lambda logits: logits.sum(), "[]"),
}


def call(model: Callable[[Any], Any], backend: str) -> Any:
    ids = mx.zeros((2, 3), mx.int32) if backend == "mlx" else torch.zeros(2, 3, dtype=torch.int64)
    logits = mx.zeros(SHAPE) if backend == "mlx" else torch.zeros(SHAPE)
    return call_model(lambda inputs: model(logits), {"inputs": ids, "labels": ids}, vocab_size=5)


@both_backends
@pytest.mark.parametrize(("model", "word"), NOT_LOGITS.values(), ids=NOT_LOGITS)
def test_an_output_that_is_not_logits(model: Callable[[Any], Any], word: str, backend: str) -> None:
    with pytest.raises(UsageError) as error:
        call(model, backend)
    assert is_one_line(str(error.value), "output of the model", word, "[2, 3, 5]")


@both_backends
def test_logits_in_half_precision_and_of_more_classes(backend: str) -> None:
    half = mx.bfloat16 if backend == "mlx" else torch.bfloat16
    assert call(lambda logits: logits.astype(half) if backend == "mlx" else logits.to(half), backend).dtype == half
    wide = call(lambda logits: (mx.concatenate if backend == "mlx" else torch.cat)([logits, logits], -1), backend)
    assert tuple(wide.shape) == (2, 3, 10)
