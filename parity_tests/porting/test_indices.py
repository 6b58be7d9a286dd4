"""Ports that compute indices and masks from values with a gradient, which MLX's indexing refuses."""

from __future__ import annotations

from typing import Any

import icenet.blas  # before mlx

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
import torch
from made_ports import close, ported
from torch import nn

import icenet


def written(h: torch.Tensor, e: nn.Embedding) -> torch.Tensor:
    y = h.clone()
    y[h[:, 0] > 0] += e.weight[0]
    y[torch.arange(len(h)), steps(h)[:, 1]] = 2
    return y * h


def rows_written(h: torch.Tensor, e: nn.Embedding) -> torch.Tensor:
    y = h.clone()
    y[h[:, 0] > 0] = e.weight[0]
    return y


def masked(h: torch.Tensor, e: nn.Embedding) -> torch.Tensor:
    y = h.clone()
    y[y < 0] *= 0.1
    return y


def steps(h: torch.Tensor) -> torch.Tensor:
    return (h.sigmoid() * 5).long()


FUNCTIONS = {
    "embedding of steps": lambda h, e: h + e(steps(h))[..., 0],
    "embedding of a comparison": lambda h, e: h + e((h > 0).long()).sum(-1),
    "embedding of a count": lambda h, e: h + e((h > 0).sum(-1)),
    "rows": lambda h, e: h * e.weight[h.round().clamp(0, 7).int()].sum(-1),
    "gather": lambda h, e: h.gather(1, steps(h)),
    "scatter": lambda h, e: torch.zeros_like(h).scatter_add(1, steps(h), h),
    "index_add": lambda h, e: torch.zeros(8, 6).index_add(0, steps(h)[:, 0], h),
    "index_select": lambda h, e: torch.index_select(e.weight, 0, steps(h)[:, 0]),
    "masked_select": lambda h, e: torch.masked_select(h, h > 0),
    "nonzero": lambda h, e: h.flatten()[torch.nonzero(h.flatten() > 0)[:, 0]],
    "where": lambda h, e: h[torch.where(h > 0)],
    "buckets": lambda h, e: h + e(torch.bucketize(h, torch.tensor([-0.5, 0.0, 0.5]))).sum(-1),
    "target": lambda h, e: nn.functional.cross_entropy(h, steps(h)[:, 0]),
    "written": written,
    "rows written": rows_written,
    "masked": masked,
}


class Indexed(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layer, self.embedding, self.function = nn.Linear(6, 6), nn.Embedding(8, 6), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer(x), self.embedding)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_indices_computed_from_floats_have_no_gradient(name: str) -> None:
    torch.manual_seed(0)
    module, x = Indexed(FUNCTIONS[name]), torch.randn(4, 6)
    model, _ = ported(module, x)
    theirs = module(x)
    theirs.square().sum().backward()
    given = mx.array(x.numpy())
    close(model(given), theirs)
    gradients = mlx_nn.value_and_grad(model, lambda: model(given).square().sum())()[1]
    assert module.layer.weight.grad is not None or name == "index_select"
    if module.layer.weight.grad is not None:
        expected = module.layer.weight.grad.numpy()
        np.testing.assert_allclose(np.array(gradients["layer"]["weight"]), expected, rtol=1e-4, atol=1e-4)


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.embedding(steps(x)).sum(-1)


class Signs(Steps):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.embedding((x > 0).long()).sum(-1)


@pytest.mark.parametrize("kind", [Steps, Signs])
def test_indices_computed_from_an_input_have_no_gradient_by_it(kind: type[Steps]) -> None:
    module, x = kind(), torch.randn(4, 6, requires_grad=True)
    model, _ = ported(module, x.detach())
    module(x).sum().backward()
    _, gradients = mx.vjp(model, [mx.array(x.detach().numpy())], [mx.ones((4, 6))])
    assert x.grad is not None
    close(gradients[0], x.grad)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.positions = nn.Linear(6, 6), nn.Embedding(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x) + self.positions(torch.arange(x.shape[0]))
        return h.gather(1, h.topk(2).indices)


def test_indices_without_a_gradient_are_given_as_they_are() -> None:
    _, source = ported(Positions(), torch.randn(4, 6))
    assert "stop_gradient" not in source.partition("class Positions")[2]


class PartsChangedInPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        y[:, 1:4] += x[:, :3]
        y[:, -2] *= 2
        y[0] += y[1]
        y[0] += y[1]
        return y


def test_a_part_that_is_changed_in_place_is_written_once() -> None:
    """Python computes `y[0] += z` in place, and then assigns the result to the part."""
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    port = icenet.port(PartsChangedInPlace(), x)
    assert np.allclose(np.array(port.module(mx.array(x.numpy()))), PartsChangedInPlace()(x), atol=1e-6)
    call = port.source[port.source.index("def __call__") :]
    assert call.count("put(") + call.count("] = ") == 4, call


def test_a_place_of_a_grid_that_is_no_number_reads_no_other_memory() -> None:
    class Sampled(nn.Module):
        def forward(self, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
            return nn.functional.grid_sample(x, grid, align_corners=True)

    x, grid = torch.randn(2, 3, 5, 4), torch.randn(2, 6, 7, 2)
    grid[0, 0, 0], grid[1, 2, 3] = float("nan"), float("inf")
    close(ported(Sampled(), x, grid)[0](mx.array(x.numpy()), mx.array(grid.numpy())), Sampled()(x, grid))
