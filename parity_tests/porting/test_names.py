"""Layers and arrays whose names MLX uses for something else."""

from __future__ import annotations

import runpy
from pathlib import Path

import icenet.blas

import mlx.core as mx
import mlx.nn
import mlx.optimizers
import numpy as np
import pytest
import torch
from made_ports import close
from mlx.utils import tree_flatten
from torch import nn

import icenet
from icenet.core.porting.source import structure


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


class Listed(nn.Module):
    """A list of layers whose name is a method of dicts, so that the port keeps it as a key."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(3):
            x = self.items[index](x)
        return x


def test_an_element_of_such_a_list_has_its_singular() -> None:
    assert 'for item in self["items"]:' in icenet.port(Listed().eval(), torch.randn(2, 4)).source


def test_the_names_of_methods_are_all_known() -> None:
    public = {name for name in dir(mlx.nn.Module) if not name.startswith("_")}
    assert public == structure.METHODS


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(2, 2)
        self.inner = nn.ModuleDict({"learning_rate": nn.Linear(2, 2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["learning_rate"](self.step(x))


class Holder(mlx.nn.Module):
    def __init__(self, port: mlx.nn.Module) -> None:
        super().__init__()
        self.port = port

    def __call__(self, x: mx.array) -> mx.array:
        return self.port(x)


def test_a_name_of_the_state_of_optimizers_is_said() -> None:
    port = icenet.port(Steps(), torch.ones(1, 2))
    assert [note.partition(":")[0] for note in port.report.notes if "optimizer" in note] == ["step"]

    def update(model: mlx.nn.Module) -> None:
        gradients = mlx.nn.value_and_grad(model, lambda x: model(x).sum())(mx.ones((1, 2)))[1]
        mlx.optimizers.SGD(0.5).update(model, gradients)

    with pytest.raises(TypeError):  # MLX's own limit, and the note's way out
        update(port.module)
    before = port.module.step.bias
    update(Holder(port.module))
    assert not mx.array_equal(before, port.module.step.bias)


class GRU(nn.Module):
    """Has the name of a layer within it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


class SpectralNorm(nn.Module):
    """Has the name of the class of a parametrization within it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("kind", [GRU, SpectralNorm])
def test_a_module_may_have_the_name_of_a_layer_within_it(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, x = kind().eval(), torch.randn(2, 5, 3)
    close(icenet.port(module, x).module(mx.array(x.numpy())), module(x))


class Arguments(nn.Module):
    """Arguments with the names of Python's functions, and of one that the port calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(
        self,
        input: torch.Tensor,
        std: torch.Tensor,
        *,
        len: int = 3,
        max: torch.Tensor,
        min: torch.Tensor | None = None,
    ) -> torch.Tensor:
        y = self.layer(input).std(-1, keepdim=True) + std * len
        return y + max if min is None else y + max * min


def test_arguments_have_the_names_of_the_original(tmp_path: Path) -> None:
    x, std, most = (torch.randn(2, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    module = Arguments()
    port = icenet.port(module, (x, std), example_kwargs={"max": most})
    theirs = module(x, std, max=most).detach()
    ours = port.module(*(mx.array(array.numpy()) for array in (x, std)), len=3, max=mx.array(most.numpy()))
    assert np.allclose(np.array(ours), theirs, atol=1e-5)
    assert "def __call__(self, input, std_, *, len=3, max, min=None):" in port.source  # the body calls std
    with pytest.raises(ValueError, match="the port was made for len=3"):
        port.module(mx.array(x.numpy()), mx.array(std.numpy()), len=4, max=mx.array(most.numpy()))
    runpy.run_path(str(port.save(tmp_path / "port") / "model.py"), run_name="__main__")
