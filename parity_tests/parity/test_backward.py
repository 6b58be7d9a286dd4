"""Faults of the backward pass alone are found at their own module; a jump at an edge is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import pytest
import torch
import torch.nn as T
import torch.nn.functional as F
from function_nets import Net, TorchNet
from pairs import draw

from icenet.parity import compare
from icenet.parity.calls import run_gradients

STAGES = ("forward", "gradients")


def around(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """Returns a pair of models with a module between two layers."""

    def call(m: Any, x: Any) -> Any:
        return m.leave(m.inner(m.enter(x)))

    return (
        Net(call, enter=M.Linear(6, 6), inner=ours, leave=M.Linear(6, 3)),
        TorchNet(call, enter=T.Linear(6, 6), inner=theirs, leave=T.Linear(6, 3)),
    )


@mx.custom_function
def squared_relu(x: mx.array) -> mx.array:
    return mx.maximum(x, 0) * x


@squared_relu.vjp
def without_factor(x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
    return cotangent * mx.maximum(x, 0)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # type: ignore[override]
        return -gradient


def custom_gradient() -> tuple[Any, Any]:
    return around(Net(lambda m, x: squared_relu(x)), TorchNet(lambda m, x: F.relu(x) * x))


def reversed_gradient() -> tuple[Any, Any]:
    return around(Net(lambda m, x: 1.0 * x), TorchNet(lambda m, x: Reversed.apply(x)))


def detached_statistics() -> tuple[Any, Any]:
    def ours(m: Any, x: Any) -> Any:
        return x * mx.stop_gradient(mx.rsqrt(mx.square(x).mean(-1, keepdims=True) + 1e-5))

    return around(Net(ours), TorchNet(lambda m, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)))


def rounded_without_straight_through() -> tuple[Any, Any]:
    return around(
        Net(lambda m, x: mx.round(4 * x) / 4), TorchNet(lambda m, x: x + ((4 * x).round() / 4 - x).detach())
    )


def detached_branch() -> tuple[Any, Any]:
    def ours(m: Any, x: Any) -> Any:
        return x + 1e-4 * m.down(M.gelu(m.up(mx.stop_gradient(m.norm(x)))))

    def theirs(m: Any, x: Any) -> Any:
        return x + 1e-4 * m.down(F.gelu(m.up(m.norm(x))))

    layers = ({"norm": k.LayerNorm(6), "up": k.Linear(6, 9), "down": k.Linear(9, 6)} for k in (M, T))
    return around(Net(ours, **next(layers)), TorchNet(theirs, **next(layers)))


def truncated_recurrence() -> tuple[Any, Any]:
    def ours(m: Any, x: Any) -> Any:
        h = mx.zeros((x.shape[0], 6))
        for step in range(x.shape[1]):
            h = mx.tanh(m.x(x[:, step]) + m.h(mx.stop_gradient(h) if step == 2 else h))
        return h

    def theirs(m: Any, x: Any) -> Any:
        h = x.new_zeros(x.shape[0], 6)
        for step in range(x.shape[1]):
            h = torch.tanh(m.x(x[:, step]) + m.h(h))
        return h

    layers = ({"x": k.Linear(6, 6), "h": k.Linear(6, 6)} for k in (M, T))
    return around(Net(ours, **next(layers)), TorchNet(theirs, **next(layers)))


def codes_without_straight_through() -> tuple[Any, Any]:
    """MLX raises an error in the backward pass: the indices of a table depend on the input."""

    def ours(m: Any, x: Any) -> Any:
        return m.codes(mx.argmin(mx.square(x[..., None, :] - m.codes.weight).sum(-1), -1))

    def theirs(m: Any, x: Any) -> Any:
        found = m.codes((x[..., None, :] - m.codes.weight).square().sum(-1).argmin(-1))
        return x + (found - x).detach()

    return around(Net(ours, codes=M.Embedding(5, 6)), TorchNet(theirs, codes=T.Embedding(5, 6)))


@pytest.mark.parametrize(
    "pair",
    [
        custom_gradient,
        reversed_gradient,
        detached_statistics,
        rounded_without_straight_through,
        detached_branch,
        truncated_recurrence,
        codes_without_straight_through,
    ],
)
def test_a_fault_of_the_backward_pass_is_found_at_its_module(pair: Callable[[], tuple[Any, Any]]) -> None:
    report = compare(*pair(), draw(3, 4, 6), copy_weights=True, stages=STAGES)
    assert report.culprit == "inner", report.verdict


def offset(sign: float) -> tuple[Any, Any]:
    """Returns modules that move 0 to different sides of an edge, by less than a rounding of their values."""
    return Net(lambda m, x: x + sign * 1e-9), TorchNet(lambda m, x: x - 1e-9)


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_a_value_at_the_edge_of_a_relu_is_no_difference(factor: float) -> None:
    def ours(m: Any, x: Any) -> Any:
        y = M.relu(m.offset(m.enter(x)))
        return m.leave(factor * y + mx.stop_gradient((1 - factor) * y))

    first, second = offset(1.0)
    pair = (
        Net(ours, enter=M.Linear(4, 4), offset=first, leave=M.Linear(4, 2)),
        TorchNet(
            lambda m, x: m.leave(F.relu(m.offset(m.enter(x)))),
            enter=T.Linear(4, 4),
            offset=second,
            leave=T.Linear(4, 2),
        ),
    )
    x = draw(8, 4)
    x[0] = 0.0
    with torch.no_grad():
        pair[1].enter.bias[0] = 0.0  # so that one output is exactly 0
    report = compare(*pair, x, copy_weights=True, stages=STAGES)
    assert report.passed == (factor == 1.0), report
    assert report.passed or report.where == "between offset and leave"


def test_rows_are_in_the_order_of_the_backward_pass_and_say_where_it_begins_to_differ() -> None:
    """The gradient of a parameter of the wrong module differs; those of the layers before it inherit that."""
    ours = Net(lambda m, x: squared_relu(x * m.scale), scale=mx.ones(6))
    theirs = TorchNet(lambda m, x: F.relu(x * m.scale) ** 2, scale=T.Parameter(torch.ones(6)))
    report = compare(*around(ours, theirs), draw(4, 6), copy_weights=True, stages=STAGES)
    rows = next(stage.rows for stage in report.stages if stage.name == "gradients")
    assert [row.path for row in rows if row.part == "gradient of output"] == ["leave", "inner", "enter", ""]
    status = {f"{row.path}.{row.part.removeprefix('gradient of ')}": row.status for row in rows}
    assert status["leave.weight"] == "passed" and status["inner.scale"] == "differs", status
    assert status["enter.weight"] == "inherits" and report.culprit == "inner", status


def test_a_module_that_returns_its_argument_has_the_gradient_by_its_own_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's gradient by the tensor is that by all uses: the difference seemed a jump, which took more runs."""
    jumps: list[Any] = []
    monkeypatch.setattr(run_gradients, "forced_run", lambda *args, **kwargs: jumps.append(args))

    def ours(m: Any, x: Any) -> Any:
        y = m.enter(x)
        return m.leave(M.tanh(m.inner(y)) + m.skip(y))

    def theirs(m: Any, x: Any) -> Any:
        y = m.enter(x)
        return m.leave(torch.tanh(m.inner(y)) + m.skip(y))

    pair = (
        Net(ours, enter=M.Linear(4, 4), inner=M.Linear(4, 4), skip=M.Identity(), leave=M.Linear(4, 2)),
        TorchNet(theirs, enter=T.Linear(4, 4), inner=T.Linear(4, 4), skip=T.Identity(), leave=T.Linear(4, 2)),
    )
    report = compare(*pair, draw(8, 4), copy_weights=True, stages=STAGES)
    rows = next(stage.rows for stage in report.stages if stage.name == "gradients")
    assert [(row.status, row.ratio <= 8) for row in rows if row.path == "skip"] == [("passed", True)]
    assert not jumps
