"""The stage `training` where gradients agree and training does not: each step is compared with equal gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import numpy as np
import pytest
import torch
import torch.nn as T
from evidence import check_model

from icenet.parity import compare


class Net(M.Module):
    """Adds a position to each pixel, which is 0 at first, and takes maxima: the empty margin has ties."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.position, self.pool, self.head = M.Embedding(64, 3), M.MaxPool2d(2, 2), M.Linear(3, 4)
        self.function = function

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.function(self.position(mx.arange(64))).reshape(8, 8, 3)
        return self.head(self.pool(x).mean(axis=(1, 2)))


class TorchNet(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position, self.pool, self.head = T.Embedding(64, 3), T.MaxPool2d(2), T.Linear(3, 4)
        T.init.zeros_(self.position.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.position(torch.arange(64)).reshape(8, 8, 3)
        return self.head(self.pool(x.permute(0, 3, 1, 2)).mean(dim=(2, 3)))


def compared(function: Callable[[Any], Any] = lambda x: x, **options: Any) -> Any:
    torch.manual_seed(0)
    images = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
    images[:, :3] = 0
    return compare(Net(function), TorchNet(), images, layout="same", copy_weights=True, **options)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_gradients_at_ties_change_the_training_and_are_no_difference(steps: int) -> None:
    """MLX divides the gradient among equal maxima, PyTorch gives it to the first."""
    report = compared(steps=steps)
    stage = report.stages[-1]
    assert report.passed and stage.name == "training" and "ties of pool" in stage.note, report
    assert "in each step" in stage.note
    distance = abs(report.losses["a"][1] - report.losses["b"][1])
    # far above the rounding of the losses, but for a single step, which `b` takes with the gradients of `a` alone
    assert distance > 1e-6 if steps > 1 else distance < 1e-6
    assert all(row.status == "passed" and row.ratio < 8 for row in stage.rows)
    gaps = [abs(a - b) for a, b in zip(report.losses["a"], report.losses["b"], strict=True)]
    assert [row.error for row in stage.rows] == pytest.approx(gaps, rel=1e-6, abs=1e-12)
    gradient = next(r for r in report.stages[4].rows if r.name == "position: gradient of output")
    assert gradient.status == "passed" and gradient.ratio < 8 and "ties of pool" in gradient.note


def _held(x: mx.array, known: list[mx.array] = []) -> mx.array:  # noqa: B006  (the fault: it is kept)
    known.append(mx.stop_gradient(x))
    return x + known[0] - mx.stop_gradient(x)


WRONG = {
    "a loss after the first step": lambda x: mx.clip(x, -1e-3, 1e-3),
    "a table that is read once": _held,
    "a gradient after the first step": lambda x: mx.where((x != 0).any(), mx.stop_gradient(x), x),
    "half of a gradient after the first step": lambda x: x + (mx.stop_gradient(x) - x) * 0.5 * (x != 0).any(),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_step_that_is_wrong_is_found_in_a_model_with_ties(name: str) -> None:
    report = compared(WRONG[name])
    assert not report.passed and report.failed_stage.name == "training", report
    assert report.verdict.startswith("differs in the training steps")


def test_gradients_that_no_stage_compared_are_compared_in_the_steps() -> None:
    report = compared(lambda x: 0.5 * x + mx.stop_gradient(0.5 * x), stages=["training"], steps=1)
    assert not report.passed and report.failed_stage.name == "training", report
    assert compared(stages=["training"], steps=1).passed


def test_a_saturated_tanh_before_a_pooling_is_no_difference() -> None:
    """Its gradients are far below the rounding of their terms, and the step of the optimizer makes them large."""
    assert check_model(20260032)["alarm"] == ""
