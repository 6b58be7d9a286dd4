"""Ports of modules that share arrays or modules: each array is there once, and its gradients are added."""

from __future__ import annotations

import copy
from pathlib import Path

import icenet.blas

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch
from made_ports import close, ported
from mlx.utils import tree_flatten, tree_map
from torch import nn

import icenet


class Mix(nn.Module):
    """Rows of 8: the gradient of MLX's layer norm on CUDA is wrong for rows of 6."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


class Block(nn.Module):
    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(self.norm(x))


class Given(nn.Module):
    """The module is also a child of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = Mix()
        self.blocks = nn.Sequential(*[Block(self.mix) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.blocks(x))


class InBlocks(nn.Module):
    """Only the blocks have the module, which is one layer."""

    def __init__(self) -> None:
        super().__init__()
        mix = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(mix) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Halves(nn.Module):
    """Two modules below others share a third one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Block(Mix()), nn.ReLU())
        self.decoder = nn.Sequential(nn.Linear(8, 8), Block(self.encoder[0].mix))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))


class Twice(nn.Module):
    """A sequence has a layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.layers = nn.Sequential(layer, nn.LayerNorm(8), layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Head(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8)
        self.out.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x)


class Tied(nn.Module):
    """A layer has the weight of one in another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.head = Head(self.first.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.first(x)))


@pytest.mark.parametrize("kind", [Given, InBlocks, Halves, Twice, Tied])
def test_what_is_shared_is_there_once_and_its_gradients_are_added(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, x = kind().train(), torch.randn(5, 8)
    model, _ = ported(copy.deepcopy(module), x)
    theirs = dict(module.named_parameters())
    assert {path for path, _ in tree_flatten(model.trainable_parameters())} == theirs.keys()
    module(x).square().sum().backward()
    loss = mlx.nn.value_and_grad(model.train(), lambda x: model(x).square().sum())
    _, gradients = loss(mx.array(x.numpy()))
    for path, gradient in tree_flatten(gradients):
        np.testing.assert_allclose(np.array(gradient), theirs[path].grad.numpy(), rtol=1e-4, atol=1e-4)
    close(model.eval()(mx.array(x.numpy())), module.eval()(x))  # the statistics of three calls


def test_a_loop_passes_a_module_that_the_first_block_holds() -> None:
    _, source = ported(InBlocks(), torch.randn(5, 8))
    assert "self.blocks = [Block(mix=True), Block(), Block()]" in source
    assert "for block in self.blocks:\n            x = block(x, self.blocks[0].mix)" in source


def test_shared_weights_are_saved_once_and_moved_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Given(), torch.randn(5, 8)
    port = icenet.port(module, (x,))
    arrays = mx.load(str(port.save(tmp_path / "port") / "weights.safetensors"))
    stored = [*module.named_parameters(), *module.named_buffers()]
    assert arrays.keys() == {path for path, value in stored if value.ndim}
    port.module.update(tree_map(lambda value: value + 0.125, port.module.trainable_parameters()))
    icenet.to_torch(port.module, module)
    assert module.blocks[2].mix is module.mix
    close(port.module(mx.array(x.numpy())), module.eval()(x))
