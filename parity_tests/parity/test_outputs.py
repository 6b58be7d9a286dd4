"""Arguments and outputs of `compare`: dataclasses, integers, booleans; unusable ones are one line."""

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
from icenet.parity import compare

Twins = tuple[Any, Any]
STAGES = ("structure", "weights", "forward", "gradients")
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
    "dataclass": (
        lambda: twins(lambda y: Output(y), lambda y: Output(2 * y)),
        "after linear; output.logits is off by",
    ),
    "integers": (lambda: twins(lambda y: y.argmin(-1), lambda y: y.argmax(-1)), "integers"),
    "both": (lambda: twins(lambda y: (y, y.argmin(-1)), lambda y: (y, y.argmax(-1))), "integers"),
    "booleans": (lambda: twins(lambda y: y < 0, lambda y: y > 0), "integers"),
    "a boolean for a float": (
        lambda: twins(lambda y: (y > 0).astype(mx.float32), lambda y: y > 0),
        "output is fp32 in a, bool in b",
    ),
    "a boolean in place of a float": (
        lambda: twins(lambda y: y > 0, lambda y: (y > 0).float()),
        "output is bool in a, fp32 in b",
    ),
}


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_equal_outputs_of_any_kind_agree(make: Callable[[], Twins]) -> None:
    assert compare(*make(), X, stages=STAGES).passed


@pytest.mark.parametrize(("make", "word"), WRONG.values(), ids=WRONG)
def test_unequal_outputs_of_any_kind_are_found(make: Callable[[], Twins], word: str) -> None:
    report = compare(*make(), X, stages=STAGES)
    assert not report.passed
    assert word in report.verdict


def plain() -> Twins:
    return twins(lambda y: y, lambda y: y)


def test_without_floats_there_is_no_loss() -> None:
    report = compare(*RIGHT["integers"](), X)
    assert report.passed
    skipped = {stage.name: stage.note for stage in report.stages if stage.status == "skipped"}
    assert skipped == dict.fromkeys(
        ("loss", "gradients", "optimizer", "training"), "b returns no floats, so there is no loss"
    )


UNUSABLE: dict[str, tuple[Any, tuple[str, ...]]] = {
    "None": ((None, None), ("inputs is no array",)),
    "no inputs": ((), ("inputs is no array", "a tuple of arrays")),
    "no rows": (X[:0], ("input 0", "values")),
    "text": ("x", ("inputs is a str", "give an array")),
}


@pytest.mark.parametrize(("inputs", "names"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_inputs_are_one_line(inputs: Any, names: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as error:
        compare(*plain(), inputs)
    assert is_one_line(str(error.value), *names)


def test_modules_may_be_swapped_and_of_any_precision() -> None:
    """PyTorch is the reference in any order. Copies of the modules are converted to the dtype of the comparison."""
    ours, theirs = plain()
    swapped = compare(theirs, ours, X, stages=STAGES)
    assert swapped.passed and "exchanged" in swapped.notes[0]
    assert compare(ours, theirs.double(), X, stages=STAGES).passed
    assert theirs.linear.weight.dtype == torch.float64
    report = compare(ours, theirs.half(), X, stages=STAGES)  # which rounds its weights
    assert is_one_line(report.verdict, "differs in linear; weight differs")


def test_a_module_without_comparable_outputs() -> None:
    with pytest.raises(UsageError, match="returns nothing that can be compared"):
        compare(*twins(lambda y: None, lambda y: None), X)


def test_outputs_in_a_dict_are_named_by_their_keys() -> None:
    class Heads(M.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = M.Linear(4, 4)

        def __call__(self, x: mx.array) -> dict[str, Any]:
            y = self.lin(x)
            return {"logits": y, "boxes": (2 * y, 3.1 * y)}

    class TorchHeads(T.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = T.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            y = self.lin(x)
            return {"logits": y, "boxes": (2 * y, 3 * y)}

    report = compare(Heads(), TorchHeads(), X[:, :4], copy_weights=True, stages=["forward"])
    assert 'output["boxes"][1] is off by' in str(report).splitlines()[0]
