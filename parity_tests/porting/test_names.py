"""Layers and arrays whose names MLX uses for something else."""

from __future__ import annotations

import icenet.blas

import mlx.core as mx
import mlx.nn
import numpy as np
import torch
from mlx.utils import tree_flatten
from test_idioms import close
from torch import nn

import icenet
from icenet.core.porting import writer


class Attention(nn.Module):
    """Every name is a method or a property of MLX's modules, which are dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Parameter(torch.randn(4))
        self.register_buffer("state", torch.randn(4))
        self.get, self.keys, self.values = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.update = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.freeze = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.get(x) @ self.keys(x).transpose(1, 2) + self.items.sum()
        y = self.update(scores.softmax(-1) @ self.values(x) + self.items * self.state)
        for layer in self.freeze:
            y = layer(y)
        return y


def test_layers_and_arrays_may_have_the_names_of_methods() -> None:
    torch.manual_seed(0)
    module, x = Attention().eval(), torch.randn(2, 3, 4)
    port = icenet.port(module, x)
    close(port.module(mx.array(x.numpy())), module(x))
    assert {path for path, _ in tree_flatten(port.module.parameters())} == set(module.state_dict())
    assert {path for path, _ in tree_flatten(port.module.trainable_parameters())} == {
        path for path, _ in module.named_parameters()
    }
    port.module["keys"]["weight"] = port.module["keys"]["weight"] + 1
    expected = module.keys.weight.detach().numpy() + 1
    icenet.to_torch(port.module, module)
    np.testing.assert_allclose(module.keys.weight.detach().numpy(), expected, rtol=1e-6)


def test_the_names_of_methods_are_all_known() -> None:
    public = {name for name in dir(mlx.nn.Module) if not name.startswith("_")}
    assert public == writer._METHODS
