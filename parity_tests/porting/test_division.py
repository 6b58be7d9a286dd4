"""Division with rounding and its remainders against PyTorch, at values where the rounding shows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import numpy as np
import pytest
import torch
from made_ports import ported
from torch import nn

from icenet.porting.functions import elementwise

FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "divide_floor": partial(torch.div, rounding_mode="floor"),
    "divide_trunc": partial(torch.div, rounding_mode="trunc"),
    "remainder": torch.remainder,
    "fmod": torch.fmod,
}
SPECIAL = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 2.5, 3.0, 7.0, 1e-20, 1e9, 16777217.0, np.inf, np.nan]
FLOATS = [*SPECIAL, *(-value for value in SPECIAL)]
INTEGERS = [-128, -7, -6, -2, -1, 0, 1, 2, 3, 5, 6, 7, 127]


def operands(values: list[Any], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns all pairs of values, and multiples of 0.1 or of 1; integers are not divided by 0."""
    rng = np.random.default_rng(0)
    pairs = np.array(list(itertools.product(values, values)), dtype)
    pairs = np.concatenate([pairs, rng.integers(-50, 50, (500, 2)).astype(dtype) * np.array(values[1], dtype)])
    if np.issubdtype(pairs.dtype, np.integer):
        pairs = pairs[pairs[:, 1] != 0]
        pairs = pairs[~((pairs[:, 0] == np.iinfo(dtype).min) & (pairs[:, 1] == -1))]
    return pairs[:, 0].copy(), pairs[:, 1].copy()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "int8"])
def test_values_are_those_of_torch(name: str, dtype: str) -> None:
    with np.errstate(over="ignore"):
        a, b = operands(FLOATS if dtype.startswith("float") else INTEGERS, dtype)
    theirs = FUNCTIONS[name](torch.tensor(a), torch.tensor(b)).numpy()
    ours = np.array(getattr(elementwise, name)(mx.array(a), mx.array(b)))
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)  # NaN equals NaN
    finite = ~np.isnan(theirs)
    np.testing.assert_array_equal(np.signbit(ours[finite]), np.signbit(theirs[finite]))  # of zeros, too


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_torch(name: str) -> None:
    a, b = operands(FLOATS, "float32")
    x, y = torch.tensor(a, requires_grad=True), torch.tensor(b)
    FUNCTIONS[name](x, y).sum().backward()  # type: ignore[no-untyped-call]
    ours = mx.grad(lambda x: getattr(elementwise, name)(x, mx.array(b)).sum())(mx.array(a))
    np.testing.assert_array_equal(np.array(ours), x.grad.numpy())  # type: ignore[union-attr]


class Quotients(nn.Module):
    def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x // 0.1, x % 0.1, 1.0 // x, n // -3, n % -3, torch.div(x, 0.1, rounding_mode="floor").to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_operators_in_a_port(dtype: torch.dtype) -> None:
    x, n = torch.tensor([1.0, -1.0, 0.3, 0.7], dtype=dtype), torch.tensor([1, -1, 5, 6])
    model, _ = ported(Quotients(), x, n)
    ours = model(mx.array(x.numpy()), mx.array(n.numpy()))
    for mine, theirs in zip(ours, Quotients()(x, n), strict=True):
        assert np.array(mine).dtype == theirs.numpy().dtype
        np.testing.assert_array_equal(np.array(mine), theirs.numpy())
    if dtype == torch.float32:
        assert np.array(ours[0]).tolist() == [9, -10, 3, 6]  # the figures of PyTorch, written out
