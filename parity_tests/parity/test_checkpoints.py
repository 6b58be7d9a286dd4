"""Modules that recompute values in their backward pass: `torch.utils.checkpoint` and `mlx.nn.utils.checkpoint`."""

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
from mlx.nn.utils import checkpoint
from pairs import draw
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from icenet.parity import compare


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    torch.manual_seed(0)


class Block(M.Module):
    """A residual block with a mask of its own in training mode."""

    def __init__(self, rate: float = 0.3, act: Callable[[Any], Any] = mx.tanh) -> None:
        super().__init__()
        self.norm, self.fc = M.LayerNorm(6), M.Linear(6, 6)
        self.rate, self.act = rate, act

    def __call__(self, x: Any) -> Any:
        y = self.act(self.fc(self.norm(x)))
        if self.training and self.rate:
            y = y * mx.random.bernoulli(1 - self.rate, y.shape) / (1 - self.rate)
        return x + y


class TorchBlock(T.Module):
    def __init__(self, rate: float = 0.3) -> None:
        super().__init__()
        self.norm, self.fc = T.LayerNorm(6), T.Linear(6, 6)
        self.rate = rate

    def forward(self, x: Any) -> Any:
        return x + F.dropout(torch.tanh(self.fc(self.norm(x))), self.rate, self.training)


def nets(ours: Any, theirs: Any, call: Any = None, torch_call: Any = None) -> tuple[Any, Any]:
    """Returns nets of two blocks and a head; the calls of a block are those given."""
    call, torch_call = call or (lambda block, x: block(x)), torch_call or (lambda block, x: block(x))
    a = Net(lambda m, x: m.head(call(m.second, call(m.first, x))), first=ours[0], second=ours[1], head=M.Linear(6, 3))
    b = TorchNet(
        lambda m, x: m.head(torch_call(m.second, torch_call(m.first, x))),
        **dict(zip(("first", "second"), theirs, strict=True)),
        head=T.Linear(6, 3),
    )
    return a, b


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_the_reference_recomputes_is_compared_as_other_modules(reentrant: bool) -> None:
    def recomputed(block: Any, x: Any) -> Any:
        return torch_checkpoint(block, x, use_reentrant=reentrant)

    for rate in (0.3, 0.4):
        pair = nets((Block(), Block(rate)), (TorchBlock(), TorchBlock()), torch_call=recomputed)
        report = compare(*pair, draw(4, 6), copy_weights=True)
        assert report.passed == (rate == 0.3), report.verdict
        assert report.passed or report.verdict.startswith("differs in second itself, after fc"), report.verdict
        assert not any("is called" in note for note in report.notes)


def test_code_between_layers_that_the_reference_recomputes() -> None:
    def theirs(m: Any, x: Any) -> Any:
        return m.out(torch_checkpoint(lambda y: torch.tanh(m.fc(y)), x, use_reentrant=False))

    for act in (mx.tanh, mx.sin):
        a = Net(lambda m, x, act=act: m.out(act(m.fc(x))), fc=M.Linear(6, 6), out=M.Linear(6, 3))
        b = TorchNet(theirs, fc=T.Linear(6, 6), out=T.Linear(6, 3))
        report = compare(a, b, draw(4, 6), copy_weights=True)
        assert report.passed == (act is mx.tanh), report.verdict
        place = "differs in the model (Net) itself, between fc and out"
        assert report.passed or report.verdict.startswith(place), report.verdict


def test_what_mlx_recomputes_is_compared_as_other_modules() -> None:
    for act in (mx.tanh, mx.sin):
        ours, theirs = (Block(0.0), Block(0.0, act)), (TorchBlock(0.0), TorchBlock(0.0))
        report = compare(*nets(ours, theirs, lambda m, x: checkpoint(m)(x)), draw(4, 6), copy_weights=True)
        assert report.passed == (act is mx.tanh), report.verdict
        assert report.passed or report.verdict.startswith("differs in second itself, after fc"), report.verdict


@pytest.mark.parametrize("how", ["random numbers", "parameters"])
def test_a_wrong_gradient_of_what_mlx_recomputes_is_found(how: str) -> None:
    """MLX draws other numbers when it recomputes, and passes no gradient to what the function is not given."""

    def without_parameters(block: Any, x: Any) -> Any:
        return mx.checkpoint(lambda y: block(y))(x)

    rate = 0.3 if how == "random numbers" else 0.0
    call = (lambda m, x: checkpoint(m)(x)) if how == "random numbers" else without_parameters
    pair = nets((Block(rate), Block(rate)), (TorchBlock(rate), TorchBlock(rate)), call)
    report = compare(*pair, draw(4, 6), copy_weights=True)
    assert "gradient of" in report.verdict
    assert report.cause.startswith("mx.checkpoint in a"), report.verdict
