"""Modules that compute with `torch.vmap`."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import torch
import torch.nn.functional as F
from made_ports import close, ported
from torch import nn


class Ensemble(nn.Module):
    """Three networks whose weights are stacked, as in PyTorch's tutorial."""

    def __init__(self) -> None:
        super().__init__()
        nets = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)) for _ in range(3)]
        stacked, _ = torch.func.stack_module_state(nets)
        self.weights = nn.ParameterDict({name.replace(".", "_"): value for name, value in stacked.items()})
        self.net = [nets[0].to("meta")]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = {name.replace("_", "."): value for name, value in self.weights.items()}
        call = torch.vmap(lambda own: torch.func.functional_call(self.net[0], own, (x,)))
        return call(weights)


def test_an_ensemble_of_networks_is_one_product_of_stacked_weights() -> None:
    theirs = Ensemble()
    model, source = ported(theirs, torch.randn(3, 4))
    x = torch.randn(5, 4)
    close(model(mx.array(x.numpy())), theirs(x))
    assert source.count(" @ ") == 2


def test_each_example_has_weights_of_its_own_and_vmaps_are_nested() -> None:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Linear(3, 20)
            self.scale = nn.Linear(5, 5)

        def forward(self, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = torch.vmap(F.linear)(x, self.weight(z).view(-1, 5, 4))
            pairs = torch.vmap(torch.vmap(torch.dot, (None, 0)), (0, None))(y, y)
            return torch.vmap(self.scale)(y), pairs

    theirs = Hyper()
    given = torch.randn(4, 4), torch.randn(4, 3)
    model, _ = ported(theirs, *given)
    for ours, wanted in zip(model(*(mx.array(x.numpy()) for x in given)), theirs(*given), strict=True):
        close(ours, wanted)
