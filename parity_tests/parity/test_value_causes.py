"""Causes in single values: arithmetic, ids, and arrays that a module holds, such as tables and masks."""

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
import torch.nn as T
import torch.nn.functional as F
from pairs import draw
from written_pairs import Pair, linear, net, verdict

from icenet_torch.tools.variants.numbers import replacing

Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    """Draws the same initial values in each run, on the CPU."""
    torch.manual_seed(0)


def between(ours: Function, theirs: Function) -> Pair:
    """Returns two linear layers with a function between them."""
    return net(
        lambda m, x: m.out(ours(m.inner(x))),
        lambda m, x: m.out(theirs(m.inner(x))),
        inner=linear(5, 8),
        out=linear(8, 3),
    )


@pytest.mark.parametrize(
    "ours, theirs, words",
    [
        (M.relu, lambda x: F.relu(x) ** 2, "a square is left out in a"),
        (lambda x: x * x + 1, lambda x: torch.sqrt(x * x + 1), "a square root is left out in a"),
        (
            lambda x: mx.power(mx.abs(x) + 1, -1),
            lambda x: (x.abs() + 1).pow(-0.5),
            "an exponent is -1 in a, -0.5 in b",
        ),
        (
            lambda x: x * mx.exp(-mx.tanh(x)),
            lambda x: x * torch.exp(torch.tanh(x)),
            "the exponent of exp has the other sign in a",
        ),
        (lambda x: mx.sin(x) - x, lambda x: torch.sin(x) + x, "a difference in a, a sum in b"),
        (
            lambda x: x - x.mean(-1, keepdims=True),
            lambda x: x - x.max(-1, keepdim=True).values,
            "mean in a, maximum in b",
        ),
        (
            lambda x: mx.where(x > 0, 2 * x, mx.sin(x)),
            lambda x: torch.where(x > 0, torch.sin(x), 2 * x),
            "the condition of where is inverted in a",
        ),
        (lambda x: mx.sin(x / 7), lambda x: torch.sin(x / 8), "a scale is 7 in a, 8 in b"),
        (
            lambda x: mx.concatenate([2 * x[..., 5:], x[..., :5]], -1),
            lambda x: torch.cat([2 * x.split([3, 5], -1)[0], x.split([3, 5], -1)[1]], -1),
            "a split takes its parts from the other end in a",
        ),
    ],
)
def test_arithmetic(ours: Function, theirs: Function, words: str) -> None:
    line = verdict(between(ours, theirs), draw(6, 5))
    assert words in line and "between inner and out" in line, line


def test_windows_that_are_merged_in_another_order() -> None:
    def ours(m: Any, x: Any) -> Any:
        y = m.inner(x).reshape(2, 2, 3, 2, 3, 8)
        return m.out(y.transpose(0, 1, 4, 3, 2, 5).reshape(2, 6, 6, 8))

    def theirs(m: Any, x: Any) -> Any:
        y = m.inner(x).view(2, 2, 3, 2, 3, 8)
        return m.out(y.permute(0, 1, 2, 3, 4, 5).reshape(2, 6, 6, 8))

    line = verdict(net(ours, theirs, inner=linear(5, 8), out=linear(8, 3)), draw(2, 6, 6, 5), layout="same")
    assert "a permute exchanges the axes 2 and 4 in addition in a" in line, line


def test_labels_that_are_exchanged_in_a_loss() -> None:
    def ours(m: Any, x: Any) -> Any:
        return mx.logaddexp(0.0, m.inner(x)).mean()

    def theirs(m: Any, x: Any) -> Any:
        y = m.inner(x)
        return F.binary_cross_entropy_with_logits(y, torch.ones_like(y))

    line = verdict(net(ours, theirs, inner=linear(5, 4)), draw(6, 5))
    assert "the labels 1 and 0 are exchanged in a" in line, line


# ---- arrays that a module holds -----------------------------------------------------------------------------


def sinusoids(cosines_first: bool) -> np.ndarray:
    angles = np.arange(6)[:, None] * 100.0 ** -(np.arange(4) / 4)
    parts = [np.sin(angles), np.cos(angles)]
    return np.concatenate(parts[::-1] if cosines_first else parts, axis=-1).astype(np.float32)


class Held(M.Module):
    """Layers, an array that is no parameter, and the function that uses them."""

    def __init__(self, call: Function, array: np.ndarray) -> None:
        super().__init__()
        self._table, self.call = mx.array(array), call
        self.inner, self.out = M.Linear(5, 8), M.Linear(8, 3)
        self.first, self.second = mx.zeros((6, 8)), mx.zeros((6, 8))

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        return self.out(self.call(self, self.inner(x), ids))


class TorchHeld(T.Module):
    def __init__(self, call: Function, array: np.ndarray) -> None:
        super().__init__()
        self.call = call
        self.inner, self.out = T.Linear(5, 8), T.Linear(8, 3)
        self.first, self.second = (T.Parameter(torch.zeros(6, 8)) for _ in range(2))
        self.register_buffer("table", torch.from_numpy(array), persistent=False)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.call(self, self.inner(x), ids))


def summed(m: Any, x: Any, ids: Any) -> Any:
    return x + m.table + m.first + 2 * m.second


@pytest.mark.parametrize(
    "ours, array, theirs, words",
    [
        (
            lambda m, x, ids: x + m._table + m.first + 2 * m.second,
            sinusoids(True),
            summed,
            "table of b has its halves exchanged in a",
        ),
        (
            lambda m, x, ids: x + m._table + m.first + 2 * m.second,
            2 * sinusoids(False) + 1,
            summed,
            "table of b has other values in a",
        ),
        (
            lambda m, x, ids: x + m._table + m.second + 2 * m.first,
            sinusoids(False),
            summed,
            "first and second are exchanged in a",
        ),
        (
            lambda m, x, ids: (1 - m.first) * x + m.first * m._table,
            sinusoids(False),
            lambda m, x, ids: m.first * x + (1 - m.first) * m.table,
            "1 - first in a, first in b",
        ),
        (
            lambda m, x, ids: x + m._table[ids + 1] + m.first + m.second,
            sinusoids(False),
            lambda m, x, ids: x + m.table[ids.long()] + m.first + m.second,
            "the ids of rows of a table are 1 larger in a",
        ),
    ],
)
def test_held_arrays(ours: Function, array: np.ndarray, theirs: Function, words: str) -> None:
    pair = Pair(Held(ours, array), TorchHeld(theirs, sinusoids(False)))
    line = verdict(pair, (draw(2, 6, 5), np.arange(12, dtype=np.int32).reshape(2, 6) % 5))
    assert words in line, line


def test_an_inverted_mask_of_a_coupling() -> None:
    mask = np.tile(np.array([1, 0], np.float32), (6, 4))

    def coupled(m: Any, x: Any, ids: Any) -> Any:
        table = m._table if isinstance(m, M.Module) else m.table
        return x * table + (1 - table) * (x * math.e + m.first + m.second)

    line = verdict(
        Pair(Held(coupled, 1 - mask), TorchHeld(coupled, mask)), (draw(2, 6, 5), np.zeros((2, 6), np.int32))
    )
    assert "table of b has its ones and zeros exchanged in a" in line, line


def test_a_number_may_be_replaced_by_an_infinite_one() -> None:
    """A whole number in the place of a whole one stays an integer, as the sum of ids must; others are as they are."""
    x = torch.tensor([1.0, 5.0])
    assert torch.equal(replacing(2.0, math.inf)(torch.clamp, (x, 0, 2), {}), x)
    assert replacing(2.0, 3.0)(max, (2, 1), {}) == 3 and isinstance(replacing(2.0, 3.0)(max, (2, 1), {}), int)
    assert replacing(2.0, 3.0)(max, (1, math.nan), {}) is NotImplemented
