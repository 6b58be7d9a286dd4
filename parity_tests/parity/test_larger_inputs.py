"""Bounds that no value of the inputs reaches: `compare` reaches them with larger inputs of single modules."""

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
import torch.nn.functional as F
from function_nets import Net, TorchNet
from pairs import draw

from icenet.parity import compare

Function = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    torch.manual_seed(0)


class Activated(M.Module):
    """Two layers with an activation between them, as a module of its own."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = M.Linear(6, 8), act, M.Linear(8, 3)

    def __call__(self, x: Any) -> Any:
        return self.fc2(self.act(self.fc1(x)))


class TorchActivated(T.Module):
    def __init__(self, act: Any) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = T.Linear(6, 8), act, T.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        return self.fc2(self.act(self.fc1(x)))


def within(ours: Function, theirs: Function, dtype: str = "fp32") -> Any:
    """Compares nets in whose code a function is called between two layers."""
    a = Net(lambda m, x: m.fc2(ours(m.fc1(x))), fc1=M.Linear(6, 8), fc2=M.Linear(8, 3))
    b = TorchNet(lambda m, x: m.fc2(theirs(m.fc1(x))), fc1=T.Linear(6, 8), fc2=T.Linear(8, 3))
    return compare(a, b, draw(4, 6), copy_weights=True, dtype=dtype)


LAYERS: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any], str]] = {
    "relu6": (M.ReLU, M.ReLU6, T.ReLU6, "ReLU in a, ReLU6 in b"),
    "relu": (M.ReLU6, M.ReLU, T.ReLU, "ReLU6 in a, ReLU in b"),
    "hardtanh": (
        lambda: Net(lambda m, x: mx.clip(x, -8, 8)),
        lambda: Net(lambda m, x: mx.clip(x, -10, 10)),
        lambda: T.Hardtanh(-10, 10),
        "clipped at -8 and 8 in a",
    ),
    "hardswish": (lambda: Net(lambda m, x: x * (x + 3) / 6), M.Hardswish, T.Hardswish, ""),
    "hardsigmoid": (
        lambda: Net(lambda m, x: x / 6 + 0.5),
        lambda: Net(lambda m, x: mx.clip(x / 6 + 0.5, 0, 1)),
        T.Hardsigmoid,
        "",
    ),
    "threshold": (
        M.Identity,
        lambda: Net(lambda m, x: mx.where(x > -10, x, -20)),
        lambda: T.Threshold(-10, -20),
        "a takes the input in its place",
    ),
}
"""By name: a wrong layer, the right one, the layer of the reference, and the cause."""


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_an_activation_with_another_bound_is_found(name: str, dtype: str) -> None:
    wrong, right, theirs, cause = LAYERS[name]
    x = draw(4, 6)
    report = compare(Activated(wrong()), TorchActivated(theirs()), x, copy_weights=True, dtype=dtype)
    assert report.verdict.startswith("differs in act; output at larger inputs is off by"), report.verdict
    assert cause in report.cause or dtype == "bf16"
    assert "inputs of up to 48" in report.stages[2].note
    report = compare(Activated(right()), TorchActivated(theirs()), x, copy_weights=True, dtype=dtype)
    assert report.passed, report.verdict


FUNCTIONS: dict[str, tuple[Function, Function, Function, str]] = {
    "relu6": (M.relu, M.relu6, F.relu6, "ReLU in a, ReLU6 in b"),
    "upper": (
        lambda x: mx.exp(0.5 * mx.clip(x, -30, 10)),
        lambda x: mx.exp(0.5 * mx.clip(x, -30, 20)),
        lambda x: torch.exp(0.5 * x.clamp(-30, 20)),
        "a bound is 10 in a, 20 in b",
    ),
    "lower": (
        lambda x: mx.clip(x, -9, 20),
        lambda x: mx.clip(x, -30, 20),
        lambda x: x.clamp(-30, 20),
        "a bound is -9 in a, -30 in b",
    ),
    "none": (lambda x: x, lambda x: mx.minimum(x, 7), lambda x: torch.clamp(x, max=7), "bounds are left out in a"),
    "added": (lambda x: mx.minimum(x, 7), lambda x: x, lambda x: x, "clipped at 7 in a"),
    "gate": (
        lambda x: mx.maximum(x, 0) * mx.sigmoid(x),
        lambda x: mx.clip(x, 0, 7) * mx.sigmoid(x),
        lambda x: x.clamp(0, 7) * torch.sigmoid(x),
        "",
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_with_another_bound_within_a_module_is_found(name: str) -> None:
    wrong, right, theirs, cause = FUNCTIONS[name]
    report = within(wrong, theirs)
    place = "differs in the model (Net) itself, between fc1 and fc2; input of fc2 at larger inputs is off by"
    assert report.verdict.startswith(place), report.verdict
    assert cause in report.cause
    report = within(right, theirs)
    assert report.passed, report.verdict


@pytest.mark.parametrize("slope", [0.1, 0.2])
def test_a_slope_that_no_value_uses_is_compared(slope: float) -> None:
    a = Net(lambda m, x: M.leaky_relu(m.size(x), slope), size=Net(lambda m, x: mx.abs(x)))
    b = TorchNet(lambda m, x: F.leaky_relu(m.size(x), 0.2), size=TorchNet(lambda m, x: x.abs()))
    report = compare(a, b, draw(4, 6))
    assert report.passed == (slope == 0.2), report.verdict
    assert slope == 0.2 or report.verdict.startswith("differs in the model (Net) itself, after size"), report.verdict


@pytest.mark.parametrize("bound", [20, 30])
def test_a_bound_of_a_function_of_positive_numbers_is_compared(bound: float) -> None:
    """Numbers of both signs make no result finite, so that the signs of the run are kept."""
    a = Net(lambda m, x: mx.sqrt(mx.minimum(m.size(x), bound)).sum(-1), size=Net(lambda m, x: mx.abs(x)))
    b = TorchNet(lambda m, x: torch.sqrt(m.size(x).clamp(max=30)).sum(-1), size=TorchNet(lambda m, x: x.abs()))
    report = compare(a, b, draw(4, 6))
    assert report.passed == (bound == 30), report.verdict
    assert bound == 30 or report.verdict.startswith("differs in the model (Net) itself, after size"), report.verdict


SAME: dict[str, tuple[Function, Function]] = {
    "softplus": (lambda x: mx.log(1 + mx.exp(x)), F.softplus),
    "sigmoid": (lambda x: 1 / (1 + mx.exp(-x)), torch.sigmoid),
    "softmax": (lambda x: mx.softmax(x, -1), lambda x: torch.exp(x) / torch.exp(x).sum(-1, keepdim=True)),
    "logarithm": (lambda x: mx.log(mx.abs(x) + 0.1), lambda x: torch.log(x.abs() + 0.1)),
    "square root": (lambda x: mx.sqrt(mx.exp(x)), lambda x: torch.sqrt(torch.exp(x))),
    "frequencies": (lambda x: mx.sin(300 * x), lambda x: torch.sin(300 * x)),
    "product": (lambda x: mx.cumprod(x, -1), lambda x: x.cumprod(-1)),
    "distance": (
        lambda x: mx.sqrt(mx.maximum((x * x).sum(1, keepdims=True) + (x * x).sum(1) - 2 * x @ x.T, 1e-6)) @ x,
        lambda x: (x[:, None] - x).square().sum(-1).clamp(min=1e-6).sqrt() @ x,
    ),
    "share": (lambda x: x / x.sum(-1, keepdims=True), lambda x: x / x.sum(-1, keepdim=True)),
}


@pytest.mark.parametrize("name", SAME)
def test_code_that_is_another_for_large_values_only_within_rounding_passes(name: str) -> None:
    report = within(*SAME[name])
    assert report.passed, report.verdict


def test_masks_of_other_numbers_are_equal_also_at_larger_inputs() -> None:
    """Scores of a softmax are not made so large that -1e4 hides nothing."""

    def ours(m: Any, x: Any) -> Any:
        y = m.fc1(x)
        return m.fc2(mx.softmax(y @ y.T + mx.triu(mx.full((4, 4), -mx.inf), 1), -1) @ y)

    def theirs(m: Any, x: Any) -> Any:
        y = m.fc1(x)
        return m.fc2(torch.softmax(y @ y.T + torch.full((4, 4), -1e4, dtype=y.dtype).triu(1), -1) @ y)

    a = Net(ours, fc1=M.Linear(6, 64), fc2=M.Linear(64, 3))
    b = TorchNet(theirs, fc1=T.Linear(6, 64), fc2=T.Linear(64, 3))
    report = compare(a, b, draw(4, 6), copy_weights=True)
    assert report.passed, report.verdict


class Pooled(M.Module):
    """The mean of the values that a mask of 1 and 0 shows."""

    def __call__(self, x: Any, mask: Any) -> Any:
        return (x * mask).sum(1) / mask.sum(1)


class TorchPooled(T.Module):
    def forward(self, x: Any, mask: Any) -> Any:
        return torch.where(mask > 0, x, 0.0).sum(1) / (mask > 0).sum(1)


def test_masks_of_ones_and_zeros_stay_masks() -> None:
    mask = (draw(3, 5, 1) > -0.5).astype("float32")
    report = compare(Pooled(), TorchPooled(), (draw(3, 5, 4), mask), stages=["forward"])  # it has no gradient in b
    assert report.passed, report.verdict


class Masked(M.Module):
    """Attention whose mask of 1 and 0 is multiplied or compared."""

    def __init__(self, is_compared: bool) -> None:
        super().__init__()
        self.fc, self.is_compared = M.Linear(6, 6), is_compared

    def __call__(self, x: Any, mask: Any) -> Any:
        scores = x @ x.swapaxes(1, 2)
        hidden = mx.where(mask == 0, -1e4, 0) if self.is_compared else (1 - mask) * -1e4
        return mx.softmax(scores + hidden[:, None], -1) @ self.fc(x)


class TorchMasked(T.Module):
    def __init__(self, is_compared: bool) -> None:
        super().__init__()
        self.fc, self.is_compared = T.Linear(6, 6), is_compared

    def forward(self, x: Any, mask: Any) -> Any:
        scores, hidden = x @ x.transpose(1, 2), ((1 - mask) * -1e4)[:, None]
        scores = scores.masked_fill(mask[:, None] == 0, -1e4) if self.is_compared else scores + hidden
        return torch.softmax(scores, -1) @ self.fc(x)


@pytest.mark.parametrize("is_compared", [False, True])
def test_a_mask_of_ones_and_zeros_has_a_gradient_on_one_side_only(is_compared: bool) -> None:
    mask = np.float32([[1, 1, 1, 0], [1, 1, 0, 0]])
    report = compare(Masked(is_compared), TorchMasked(not is_compared), (draw(2, 4, 6), mask), copy_weights=True)
    assert report.passed, report.verdict
    assert any("gradients by masks of 1 and 0" in note for note in report.notes)


BOUND: dict[str, tuple[Any, Function, Function]] = {
    "unit vectors": (
        draw(5, 6) / np.linalg.norm(draw(5, 6), axis=-1, keepdims=True),
        lambda x: 2 - 2 * x @ x.T,
        lambda x: (x[:, None] - x[None]).square().sum(-1),
    ),
    "probabilities": (
        np.exp(draw(5, 6)) / np.exp(draw(5, 6)).sum(-1, keepdims=True),
        lambda x: 1 - (x * x).sum(-1),
        lambda x: (x * (1 - x)).sum(-1),
    ),
}


@pytest.mark.parametrize("name", BOUND)
def test_code_that_relies_on_what_its_inputs_are_passes(name: str) -> None:
    x, ours, theirs = BOUND[name]
    report = compare(Net(lambda m, x: ours(x)), TorchNet(lambda m, x: theirs(x)), x, stages=["forward"])
    assert report.passed, report.verdict


def test_a_small_array_reaches_a_narrow_range() -> None:
    """A softplus is its input above 20 in PyTorch. Above 3, it is only within 0.05 of it."""
    report = within(lambda x: mx.where(x > 3, x, mx.logaddexp(x, 0)), F.softplus)
    assert "at larger inputs" in report.verdict, report.verdict
    report = within(lambda x: mx.logaddexp(x, 0), F.softplus)
    assert report.passed, report.verdict
    bound = TorchNet(lambda m, x: x.clamp(max=44))  # six values reach the last eighth of the range
    a = Net(lambda m, x: m.act(x), act=Net(lambda m, x: mx.minimum(x, 40)))
    report = compare(a, TorchNet(lambda m, x: m.act(x), act=bound), draw(2, 3))
    assert report.verdict.startswith("differs in act"), report.verdict


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "ours, theirs, words",
    [
        (lambda x: M.leaky_relu(x, 0.02), lambda x: F.leaky_relu(x, 0.01), "the slope or alpha is 0.02 in a"),
        (M.relu, lambda x: F.leaky_relu(x, 0.01), "ReLU in a"),
        (lambda x: M.elu(x, 0.06), lambda x: F.elu(x, 0.05), "the slope or alpha is 0.06 in a, 0.05 in b"),
    ],
)
def test_small_slopes_in_half_precision(ours: Function, theirs: Function, words: str, dtype: str) -> None:
    report = within(ours, theirs, dtype=dtype)
    assert not report.passed and words in report.verdict, report.verdict


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "ours, theirs", [(M.silu, F.silu), (M.gelu, F.gelu), (M.elu, F.elu), (M.softplus, F.softplus)]
)
def test_activations_that_are_near_zero_for_negative_inputs(ours: Function, theirs: Function, dtype: str) -> None:
    report = within(ours, theirs, dtype=dtype)
    assert report.passed, report.verdict


def test_a_bound_of_an_exponent_next_to_sums() -> None:
    def ours(x: Any) -> Any:
        return mx.exp(0.5 * mx.clip(x, -30.0, 10.0)) + x.sum(-1, keepdims=True)

    def theirs(x: Any) -> Any:
        return torch.exp(0.5 * x.clamp(-30.0, 20.0)) + x.sum(-1, keepdim=True)

    report = within(ours, theirs)
    assert not report.passed and "a bound is 10 in a, 20 in b" in report.verdict, report.verdict
