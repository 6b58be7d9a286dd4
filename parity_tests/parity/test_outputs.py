"""Arguments and outputs of `compare_modules`: dataclasses, integers, booleans; unusable ones are one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import numpy as np
import pytest
import torch
import torch.nn as T
from helpers import is_one_line

from icenet.core.errors import UsageError
from icenet.core.models.modules import copy_weights
from icenet.parity.modules import compare_modules

Twins = tuple[Any, Any]
X = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)


@dataclass
class Output:
    logits: Any
    loss: Any = None


def twins(by_mlx: Callable[[Any], Any], by_torch: Callable[[Any], Any]) -> Twins:
    """Returns twins with one linear layer, whose result the two functions turn into outputs."""

    class Ours(M.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = M.Linear(8, 5)

        def __call__(self, x: mx.array) -> Any:
            return by_mlx(self.linear(x))

    class Theirs(T.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = T.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> Any:
            return by_torch(self.linear(x))

    torch.manual_seed(0)
    ours, theirs = Ours(), Theirs()
    copy_weights(theirs, ours)
    return ours, theirs


RIGHT: dict[str, Callable[[], Twins]] = {
    "dataclass": lambda: twins(lambda y: Output(2 * y), lambda y: Output(2 * y)),
    "integers": lambda: twins(lambda y: y.argmax(-1), lambda y: y.argmax(-1)),
    "booleans": lambda: twins(lambda y: y > 0, lambda y: y > 0),
    "both": lambda: twins(lambda y: (y, y.argmax(-1)), lambda y: (y, y.argmax(-1))),
}
WRONG: dict[str, tuple[Callable[[], Twins], str]] = {
    "dataclass": (lambda: twins(lambda y: Output(y), lambda y: Output(2 * y)), "(model output)"),
    "integers": (lambda: twins(lambda y: y.argmin(-1), lambda y: y.argmax(-1)), "integers"),
    "both": (lambda: twins(lambda y: (y, y.argmin(-1)), lambda y: (y, y.argmax(-1))), "integers"),
    "booleans": (lambda: twins(lambda y: y < 0, lambda y: y > 0), "integers"),
    "a boolean for a float": (
        lambda: twins(lambda y: (y > 0).astype(mx.float32), lambda y: y > 0),
        "dtype fp32 in MLX, bool in PyTorch",
    ),
}


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_equal_outputs_of_any_kind_agree(make: Callable[[], Twins]) -> None:
    assert compare_modules(*make(), [X]).passed


@pytest.mark.parametrize(("make", "word"), WRONG.values(), ids=WRONG)
def test_unequal_outputs_of_any_kind_are_found(make: Callable[[], Twins], word: str) -> None:
    report = compare_modules(*make(), [X])
    assert not report.passed
    assert word in report.verdict()


def plain() -> Twins:
    return twins(lambda y: y, lambda y: y)


UNUSABLE: dict[str, tuple[Callable[[Any, Any], Any], tuple[str, ...]]] = {
    "swapped": (lambda ours, theirs: compare_modules(theirs, ours, [X]), ("first", "Theirs")),
    "an array": (lambda ours, theirs: compare_modules(ours, theirs, X), ("mlx_inputs", "[x]", "ndarray")),
    "None": (lambda ours, theirs: compare_modules(ours, theirs, None), ("mlx_inputs", "NoneType")),
    "no inputs": (lambda ours, theirs: compare_modules(ours, theirs, []), ("mlx_inputs", "empty")),
    "no rows": (lambda ours, theirs: compare_modules(ours, theirs, [X], [X[:0]]), ("torch_inputs[0]", "values")),
    "float16": (
        lambda ours, theirs: compare_modules(ours, theirs.half(), [X]),
        ("linear.weight", "float16", "float()"),
    ),
    "float64": (lambda ours, theirs: compare_modules(ours, theirs.double(), [X]), ("linear.weight", "float64")),
}


@pytest.mark.parametrize(("call", "names"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_arguments_are_one_line(call: Callable[[Any, Any], Any], names: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as error:
        call(*plain())
    assert is_one_line(str(error.value), *names)


def test_a_module_without_comparable_outputs() -> None:
    with pytest.raises(UsageError, match="returns nothing that can be compared"):
        compare_modules(*twins(lambda y: None, lambda y: None), [X])
