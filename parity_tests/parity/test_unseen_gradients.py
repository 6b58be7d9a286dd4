"""Gradients that a run does not show: overflow and underflow in half precision, edges, branches of small factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch

from icenet.parity import compare

STAGES = ("forward", "loss", "gradients")


class MlxCall(mlx.nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def __call__(self, x: Any) -> Any:
        return self.call(x)


class TorchCall(torch.nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Any) -> Any:
        return self.call(x)


def report_of(ours: Callable[..., Any], theirs: Callable[..., Any], x: np.ndarray, dtype: str = "fp16") -> Any:
    return compare(MlxCall(ours), TorchCall(theirs), x, dtype=dtype, stages=STAGES)


def numbers(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


EDGE = np.concatenate([np.full(4, 3 - 2.0**-9), numbers(60, scale=3.0)]).astype(np.float32)
"""Numbers of fp16, some of which are the last one before 3: after the addition of 3 they are 6."""


class MlxGate(mlx.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = mlx.nn.Linear(4, 8), mlx.nn.Linear(8, 4)

    def __call__(self, x: Any) -> Any:
        return 30.0 * self.down(mlx.nn.silu(self.up(x)))


class TorchGate(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)

    def forward(self, x: Any) -> Any:
        return 30.0 * self.down(torch.nn.functional.silu(self.up(x)))


def test_gradients_that_overflow_in_fp16_are_compared_with_a_smaller_loss() -> None:
    torch.manual_seed(0)
    report = compare(
        MlxGate(), TorchGate(), numbers(3, 4, scale=300.0), dtype="fp16", stages=STAGES, copy_weights=True
    )
    assert report.passed, report.verdict
    assert any("the loss is multiplied by" in note for note in report.notes)


def test_a_wrong_gradient_is_found_with_a_smaller_loss() -> None:
    class Wrong(MlxGate):
        def __call__(self, x: Any) -> Any:
            y = mlx.nn.silu(self.up(x))
            return 30.0 * self.down(0.9 * y + mx.stop_gradient(0.1 * y))

    torch.manual_seed(0)
    report = compare(Wrong(), TorchGate(), numbers(3, 4, scale=300.0), dtype="fp16", stages=STAGES, copy_weights=True)
    assert report.failed_stage is not None and report.failed_stage.name == "gradients"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_an_input_within_a_rounding_of_an_edge_is_no_difference(dtype: str) -> None:
    x = EDGE if dtype == "fp16" else np.append(EDGE[4:], np.float32(3 - 2.0**-6))
    report = report_of(mlx.nn.hardswish, torch.nn.functional.hardswish, x, dtype)
    assert report.passed, report.verdict


def test_a_wrong_gradient_next_to_an_edge_is_found() -> None:
    def wrong(x: Any) -> Any:
        y = mlx.nn.hardswish(x)
        return 0.98 * y + mx.stop_gradient(0.02 * y)

    report = report_of(wrong, torch.nn.functional.hardswish, EDGE)
    assert report.failed_stage is not None and report.failed_stage.name == "gradients"


def test_a_derivative_below_the_numbers_of_fp16_may_be_zero() -> None:
    x = np.concatenate([np.linspace(-14, -11.2, 20), np.linspace(20, 30, 20)]).astype(np.float32)[None]
    report = report_of(lambda x: 4.0 * mx.sigmoid(x), lambda x: 4.0 * torch.sigmoid(x), x)
    assert report.passed, report.verdict


def test_a_loss_that_overflows_on_both_sides_is_no_difference() -> None:
    report = report_of(lambda x: x * 1000.0 - 999.0 * x, lambda x: x * 1000.0 - 999.0 * x, numbers(4, 4, scale=300.0))
    assert report.passed, report.verdict
    report = report_of(lambda x: x * 1000.0 - 999.0 * x, lambda x: x, numbers(4, 4, scale=300.0))
    assert not report.passed


class MlxBranch(mlx.nn.Module):
    """A norm whose gradient by its input is half of what it should be."""

    def __init__(self, is_wrong: bool) -> None:
        super().__init__()
        self.is_wrong, self.weight = is_wrong, mx.ones((8,))

    def __call__(self, x: Any) -> Any:
        x = 0.5 * x + mx.stop_gradient(0.5 * x) if self.is_wrong else x
        return self.weight * (x * mx.rsqrt(mx.mean(mx.square(x), axis=-1, keepdims=True) + 1e-6))


class TorchBranch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, x: Any) -> Any:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class MlxDamped(mlx.nn.Module):
    def __init__(self, is_wrong: bool) -> None:
        super().__init__()
        self.enter, self.norm = mlx.nn.Linear(8, 8), MlxBranch(is_wrong)
        self.up, self.head = mlx.nn.Linear(8, 8), mlx.nn.Linear(8, 2)

    def __call__(self, x: Any) -> Any:
        x = self.enter(x)
        return self.head(x + 1e-7 * self.up(self.norm(x)))


class TorchDamped(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = torch.nn.Linear(8, 8), TorchBranch()
        self.up, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)

    def forward(self, x: Any) -> Any:
        x = self.enter(x)
        return self.head(x + 1e-7 * self.up(self.norm(x)))


def test_a_wrong_gradient_in_a_branch_of_a_small_factor_is_found() -> None:
    torch.manual_seed(0)
    x = numbers(16, 8)
    report = compare(MlxDamped(True), TorchDamped(), x, stages=STAGES, copy_weights=True)
    assert report.culprit == "norm", report.verdict
    assert compare(MlxDamped(False), TorchDamped(), x, stages=STAGES, copy_weights=True).passed
