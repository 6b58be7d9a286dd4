"""Linear layers next to convolutions of size 1, which compute the same."""

from __future__ import annotations

from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import pytest
import torch
import torch.nn as T
import torch.nn.functional as F
from pairs import draw

from icenet.parity import compare


class Net(M.Module):
    def __init__(self, first: M.Module, second: M.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.first, self.second, self.factor = first, second, factor

    def __call__(self, x: mx.array) -> mx.array:
        return self.second(M.gelu(self.factor * self.first(x)))


class TorchNet(T.Module):
    def __init__(self, first: T.Module, second: T.Module, moves: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.moves = first, second, moves

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.movedim(-1, 1) if self.moves else x
        x = self.second(T.functional.gelu(self.first(x)))
        return x.movedim(1, -1) if self.moves else x


CASES: dict[str, tuple[Any, Any, tuple[int, ...], dict[str, Any]]] = {
    "images": (
        lambda: Net(M.Linear(5, 6), M.Linear(6, 4)),
        lambda: TorchNet(T.Conv2d(5, 6, 1), T.Conv2d(6, 4, 1)),
        (2, 7, 8, 5),
        {},
    ),
    "square images of as many channels": (
        lambda: Net(M.Linear(6, 6), M.Conv2d(6, 6, 3)),
        lambda: TorchNet(T.Conv2d(6, 6, 1, bias=False), T.Conv2d(6, 6, 3)),
        (2, 6, 6, 6),
        {},
    ),
    "signals": (
        lambda: Net(M.Linear(5, 6), M.Linear(6, 4)),
        lambda: TorchNet(T.Conv1d(5, 6, 1), T.Conv1d(6, 4, 1)),
        (2, 7, 5),
        {},
    ),
    "sequences": (
        lambda: Net(M.Linear(5, 6), M.Linear(6, 4)),
        lambda: TorchNet(T.Conv1d(5, 6, 1), T.Conv1d(6, 4, 1), moves=True),
        (2, 7, 5),
        {"layout": "same"},
    ),
    "a convolution in MLX": (
        lambda: Net(M.Conv1d(5, 6, 1), M.Linear(6, 4)),
        lambda: TorchNet(T.Linear(5, 6), T.Linear(6, 4)),
        (2, 7, 5),
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_linear_layer_is_a_convolution_of_size_1(name: str) -> None:
    ours, theirs, shape, options = CASES[name]
    a, b = ours(), theirs()
    if b.first.bias is None:
        a.first = M.Linear(6, 6, bias=False)
    before = {name: value.clone() for name, value in b.state_dict().items()}
    report = compare(a, b, draw(*shape), copy_weights=True, **options)
    assert report.passed and all(stage.status == "passed" for stage in report.stages), report
    assert "whose weight has the same values" in str(report)
    assert all(torch.equal(before[name], value) for name, value in b.state_dict().items())
    a.factor = 1.001
    report = compare(a, b, draw(*shape), copy_weights=True, stages=["forward"], **options)
    assert report.culprit == "" and "between first and second" in report.where, report


def test_other_weights_of_the_layer_are_a_difference() -> None:
    a, b = Net(M.Linear(5, 6), M.Linear(6, 4)), TorchNet(T.Conv2d(5, 6, 1), T.Conv2d(6, 4, 1))
    report = compare(a, b, draw(2, 7, 8, 5), copy_weights=False)
    assert report.failed_stage is not None and report.failed_stage.name == "weights" and report.culprit == "first"


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}])
def test_a_convolution_that_is_no_matrix_is_a_difference(options: dict[str, Any]) -> None:
    a, b = Net(M.Linear(5, 6), M.Linear(6, 4)), TorchNet(T.Conv2d(5, 6, 1, **options), T.Conv2d(6, 4, 1))
    report = compare(a, b, draw(2, 7, 8, 5), copy_weights=True)
    assert report.culprit == "first" and "weight is [6, 5] in a, [6, 5, 1, 1] in b" in report.verdict


def test_an_array_of_another_module_keeps_its_shape() -> None:
    """What reads the weight of a layer needs its axes."""

    class Reader(T.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TorchNet(T.Conv1d(5, 6, 1), T.Identity())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            layer = self.inner.first
            return F.gelu(F.conv1d(x, layer.weight, layer.bias))

    moved = {f"first.{name}": f"inner.first.{name}" for name in ("weight", "bias")}
    report = compare(Net(M.Linear(5, 6), M.Identity()), Reader(), draw(2, 7, 5), rename=moved, copy_weights=True)
    assert "weight is [6, 5] in a, [6, 5, 1] in b" in report.verdict, report
    theirs, ours = TorchNet(T.Conv2d(6, 6, 1), T.Conv2d(6, 4, 1)), Net(M.Linear(6, 6), M.Linear(6, 4))
    theirs.table, ours.table = theirs.first.weight, mx.zeros((6, 6, 1, 1))
    assert not compare(ours, theirs, draw(2, 5, 5, 6), copy_weights=True).passed  # in `b` they are one parameter


class Reading(TorchNet):
    """Reads the weight and the attributes of a layer, and has it at two places."""

    def __init__(self) -> None:
        super().__init__(T.Conv2d(6, 6, 1), T.Conv2d(6, 4, 1))
        self.again = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.first.weight[:, 0, 0, 0].sum() * self.first.out_channels
        return self.second(F.conv2d(self.again(self.first(x)), self.again.weight)) * scale


class Read(Net):
    def __init__(self) -> None:
        super().__init__(M.Linear(6, 6), M.Linear(6, 4))
        self.again = self.first

    def __call__(self, x: mx.array) -> mx.array:
        return self.second(self.again(self.first(x)) @ self.first.weight.T) * self.first.weight[:, 0].sum() * 6


def test_weights_and_attributes_that_the_code_reads() -> None:
    ours, theirs, images = Read(), Reading(), draw(2, 5, 5, 6)
    assert compare(ours, theirs, images, copy_weights=True).passed
    ours.again = M.Linear(6, 6)
    assert not compare(ours, theirs, images, copy_weights=True).passed


def test_hooks_of_a_layer_are_called() -> None:
    seen: list[torch.Tensor] = []
    options: dict[str, Any] = {"copy_weights": True, "stages": ["forward"]}
    ours, theirs = Net(M.Linear(5, 6), M.Linear(6, 4)), TorchNet(T.Conv1d(5, 6, 1), T.Conv1d(6, 4, 1))
    theirs.first.register_forward_hook(lambda module, args, y: seen.append(y))
    assert compare(ours, theirs, draw(2, 7, 5), **options).passed and seen
    theirs.first.register_forward_hook(lambda module, args, y: torch.tanh(y))
    report = compare(ours, theirs, draw(2, 7, 5), **options)
    assert report.failed_stage is not None and report.failed_stage.name == "forward" and "tanh" in report.cause, (
        report
    )


@pytest.mark.parametrize("keys", [None, "weight"])
def test_what_only_a_freezes_is_named(keys: str | None) -> None:
    ours, theirs = Net(M.Linear(5, 6), M.Linear(6, 4)), TorchNet(T.Linear(5, 6), T.Linear(6, 4))
    ours.first.freeze(keys=keys)
    report = compare(ours, theirs, draw(7, 5), copy_weights=True)
    assert report.culprit == "first" and "weight is frozen in a, and trained in b" in str(report), report
