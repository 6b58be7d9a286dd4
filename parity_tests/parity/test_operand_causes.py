"""Causes in single expressions of the reference: another variable, number, index or activation in the port."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import numpy as np
import pytest
import torch
from pairs import draw
from written_pairs import linear, net, verdict

Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    """Draws the same initial values in each run, on the CPU."""
    torch.manual_seed(0)


def attend(m: Any, x: Any) -> Any:
    source, target = torch.tensor([0, 1, 1, 2, 3]), torch.tensor([3, 0, 2, 1, 0])
    left, right = m.left(x), m.right(x)
    scores = torch.tanh(left[source] + right[target])
    weights = scores.exp() / (scores.exp().sum(0, keepdim=True) + 1e-16)
    return m.out(weights * left[target])


def sums(x: Any) -> Any:
    return x.sum(0, keepdims=True) + 1e-16


def attending(left: Function, right: Function, value: Function, total: Function = sums) -> Function:
    """Returns the port of `attend` whose three gathers get the rows and both arrays of ids."""

    def call(m: Any, x: Any) -> Any:
        source, target = mx.array([0, 1, 1, 2, 3]), mx.array([3, 0, 2, 1, 0])
        rows = m.left(x), m.right(x), source, target
        scores = mx.exp(mx.tanh(left(*rows) + right(*rows)))
        return m.out(scores / total(scores) * value(*rows))

    return call


RIGHT = (lambda x, y, i, j: x[i], lambda x, y, i, j: y[j], lambda x, y, i, j: x[j])


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (
            attending(RIGHT[0], RIGHT[1], lambda x, y, i, j: y[j]),
            "a has right in place of left in `left[target]` of b",
        ),
        (attending(RIGHT[0], RIGHT[1], lambda x, y, i, j: x[i]), "a has source in place of target in `left[target]`"),
        (
            attending(lambda x, y, i, j: y[i], lambda x, y, i, j: x[j], RIGHT[2]),
            "the variables left and right of b are exchanged in a, in `scores = torch.tanh(left[source]",
        ),
        (
            attending(*RIGHT, lambda x: x.sum(0, keepdims=True) + 0.5),
            "0.5 in a in place of 1e-16 in `scores.exp().sum(0, keepdim=True) + 1e-16` of b",
        ),
    ],
)
def test_the_variable_or_number_of_an_expression(ours: Function, words: str) -> None:
    pair = net(ours, attend, left=linear(5, 8), right=linear(5, 8), out=linear(8, 3))
    assert words in verdict(pair, draw(4, 5))


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (lambda x: mx.clip(x, -0.1, 0.1), lambda x: x.clamp(-0.5, 0.5), "0.1 in a in place of each 0.5 in `x.clamp("),
        (lambda x: x * x[:, 3, None] * x, lambda x: x * x[:, 2, None] * x, "3 in a in place of 2 in `x[:, 2, None]`"),
        (
            lambda x: M.silu(x),
            lambda x: x * torch.tanh(torch.nn.functional.softplus(x)),
            "SiLU in a in place of `x * torch.tanh(",
        ),
    ],
)  # fmt: skip
def test_an_expression_between_two_layers(ours: Function, theirs: Function, words: str) -> None:
    pair = net(
        lambda m, x: m.out(ours(m.inner(x))),
        lambda m, x: m.out(theirs(m.inner(x))),
        inner=linear(5, 8), out=linear(8, 3),
    )  # fmt: skip
    assert words in verdict(pair, draw(4, 5))


def test_values_that_are_not_finite_in_a_have_a_cause() -> None:
    """The first row of the mask hides all elements: 0 / 0."""

    def ours(m: Any, x: Any) -> Any:
        distance = mx.arange(4)[:, None] - mx.arange(4)
        decay = mx.where(distance > 0, mx.exp(-0.1 * distance * distance), 0.0)
        return m.out(decay / decay.sum(1, keepdims=True) @ m.inner(x))

    def theirs(m: Any, x: Any) -> Any:
        distance = torch.arange(4)[:, None] - torch.arange(4)
        decay = torch.where(distance >= 0, torch.exp(-0.1 * distance.to(x.dtype) * distance), 0.0)
        return m.out(decay / decay.sum(1, keepdim=True) @ m.inner(x))

    line = verdict(net(ours, theirs, inner=linear(5, 8), out=linear(8, 3)), draw(4, 5))
    assert "not finite in a only" in line and "> in a, >= in b: equal values" in line


def test_the_gate_of_glu() -> None:
    def ours(m: Any, x: Any) -> Any:
        first, second = mx.split(m.inner(x), 2, axis=-1)
        return m.out(first * mx.tanh(second))

    pair = net(
        ours, lambda m, x: m.out(torch.nn.functional.glu(m.inner(x))), inner=linear(5, 8), out=linear(4, 3)
    )  # fmt: skip
    assert "tanh in the gate of GLU in a, sigmoid in b" in verdict(pair, draw(4, 5))


def test_a_table_of_indices_is_transposed() -> None:
    index = np.arange(9).reshape(3, 3) * 2 % 9

    class Table(M.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self._index = mx.zeros((9, 4)), mx.array(index.T)

        def __call__(self, x: Any) -> Any:
            return x + self.table[self._index]

    class TorchTable(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(9, 4) / math.pi)
            self.register_buffer("position_index", torch.tensor(index), persistent=False)

        def forward(self, x: Any) -> Any:
            return x + self.table[self.position_index]

    from written_pairs import Pair

    assert "position_index of b has its last axes exchanged in a" in verdict(
        Pair(Table(), TorchTable()), draw(3, 3, 4)
    )
