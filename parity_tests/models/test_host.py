"""Functions that numpy computes for MLX on a CPU, against PyTorch in float64."""

from __future__ import annotations

from typing import Any

import icenet.blas  # noqa: F401  (first: it decides which BLAS MLX finds)

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import torch

from icenet.nn import host

SHAPE = (80, 64)
FUNCTIONS = pytest.mark.parametrize("name", ["exp", "tanh", "sigmoid"])


def drawn(seed: int, scale: float) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=SHAPE)).astype(np.float32)


def difference(found: Any, expected: torch.Tensor) -> float:
    """Returns the largest difference, relative to the largest value."""
    return float(np.abs(np.array(found) - expected.detach().numpy()).max() / expected.detach().abs().max())


@FUNCTIONS
def test_values_and_derivatives(name: str) -> None:
    """Those of first and second order, in forward and reverse mode, and where MLX traces."""
    assert SHAPE[0] * SHAPE[1] >= host.SMALLEST
    function, exact = getattr(host, name), getattr(torch, name)
    values, vector = drawn(0, 3), drawn(1, 1)
    t = torch.from_numpy(values).double().requires_grad_()
    y = exact(t)
    (first,) = torch.autograd.grad((y**2).sum(), t, create_graph=True)
    (second,) = torch.autograd.grad((first * torch.from_numpy(vector)).sum(), t)
    (slope,) = torch.autograd.grad(exact(t).sum(), t)

    x, v = mx.array(values), mx.array(vector)
    gradient = mx.grad(lambda x: (function(x) ** 2).sum())
    assert difference(function(x), y) < 2e-7
    assert difference(gradient(x), first) < 1e-6
    assert difference(mx.grad(lambda x: (gradient(x) * v).sum())(x), second) < 2e-6
    assert difference(mx.jvp(function, [x], [v])[1][0], slope * torch.from_numpy(vector)) < 1e-6
    assert difference(mx.jvp(gradient, [x], [v])[1][0], second) < 2e-6
    for transformed in (mx.compile(gradient)(x), mx.vmap(gradient)(mx.stack([x, x]))[1]):
        assert difference(transformed, first) < 2e-6  # MLX's own functions


@FUNCTIONS
def test_special_values(name: str) -> None:
    special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1000.0, -1000.0, 1e-40], np.float32)
    x = np.resize(special, SHAPE)
    found = np.array(getattr(host, name)(mx.array(x)))
    expected = getattr(torch, name)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-30)


def test_other_dtypes_and_few_values_are_those_of_mlx() -> None:
    x = mx.array(drawn(0, 1))
    assert host.can_compute(x, None, x > 0)
    assert not host.can_compute(x, x.astype(mx.bfloat16))
    assert host.exp(x.astype(mx.float16)).dtype == mx.float16
    assert host.exp(x[:1]).shape == (1, SHAPE[1])
