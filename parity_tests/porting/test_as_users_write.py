"""Modules as users write them, of which a port was wrong, did not run from its folder, or was refused."""

from __future__ import annotations

import runpy
from math import sqrt
from pathlib import Path

import icenet.blas

import mlx.core as mx
import pytest
import torch
from made_ports import close, ported
from mlx.utils import tree_flatten
from torch import nn

import icenet
from icenet.core.porting.source.lines import Line
from icenet.core.porting.source.loops import roll


def test_a_part_of_a_tuple_gets_an_axis() -> None:
    class Peaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.max(1)[0].unsqueeze(1)

    ours, source = ported(Peaks(), torch.randn(3, 4))
    x = torch.randn(5, 6)
    close(ours(mx.array(x.numpy())), Peaks()(x))
    assert "[0][:, None]" in source


def test_frozen_layers_in_lists_stay_frozen() -> None:
    theirs = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4)), "b": nn.Linear(4, 4)})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = theirs
            self.gains = nn.ParameterList([torch.ones(4), torch.ones(4)]).requires_grad_(False)
            self.parts["a"][0].requires_grad_(False)
            self.parts["b"].bias.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts["b"](self.parts["a"](x)) * self.gains[0] + self.gains[1]

    net = Net()
    ours, _ = ported(net, torch.randn(2, 4))
    trained = {path for path, _ in tree_flatten(ours.trainable_parameters())}
    assert trained == {path for path, value in net.named_parameters() if value.requires_grad}


def test_a_sequence_alone_runs_from_its_folder(tmp_path: Path) -> None:
    port = icenet.port(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(2, 8))
    port.save(tmp_path)
    x = mx.ones((3, 8))
    model = runpy.run_path(str(tmp_path / "model.py"))["load"]()
    assert mx.array_equal(model(x), port.module(x))


def test_a_list_may_be_called_s() -> None:
    lines = [Line(f"x = self.s[{index}](x)") for index in range(3)]
    assert [line.code for line in roll(lines, {})] == ["for layer in self.s@0:3@:", "x = layer(x)"]


def test_a_batch_of_one_may_be_computed_in_another_way() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(x).squeeze(0)

    theirs, x = One(), torch.randn(1, 3, 4)
    port = icenet.port(theirs, x)
    close(port.module(mx.array(x.numpy())), theirs(x))
    with pytest.raises(ValueError, match="x has 2 in dimension 0; the port was made for 1"):
        port.module(mx.zeros((2, 3, 4)))


class Grid(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = int(sqrt(x.shape[1]))
        return x.view(x.shape[0], side, x.shape[1] // side).cumsum(1)


class Power(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = int(x.shape[1] ** 0.5)
        return x.view(x.shape[0], side, side).cumsum(1)


@pytest.mark.parametrize("net", [Grid, Power])
def test_an_integer_root_of_a_size_limits_it(net: type[nn.Module]) -> None:
    port = icenet.port(net(), torch.randn(2, 16))
    assert port.report.notes
    with pytest.raises(ValueError, match="x has 25 in dimension 1; the port was made for 16"):
        port.module(mx.zeros((2, 25)))


def test_an_imported_root_of_a_size_is_open() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / sqrt(x.shape[1])

    ours, source = ported(Scaled(), torch.randn(2, 5))
    assert "math.sqrt(x.shape[1])" in source and sqrt(4) == 2
    x = torch.randn(2, 7)
    close(ours(mx.array(x.numpy())), Scaled()(x))


def test_helpers_compare_no_constants() -> None:
    class Largest(nn.Module):
        def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return torch.zeros(2, 3).scatter_reduce(1, index, x, "amax")

    _, source = ported(Largest(), torch.randn(2, 4), torch.randint(0, 3, (2, 4)))
    assert '"amax"' not in source, source


def test_numbers_have_the_dtypes_of_pytorch() -> None:
    """Two numbers in `where`, a power of integers, and a scalar among the inputs."""

    class Numbers(nn.Module):
        def forward(self, x: torch.Tensor, n: torch.Tensor, *, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.where(x > 0, 1, 0), torch.where(n > 1, 2.5, -1.0), n.pow(2.0), torch.sin(x) * scale

    x, n, scale = torch.randn(2, 3), torch.tensor([1, 2, 3]), torch.tensor(2.0)
    assert icenet.port(Numbers(), (x, n), example_kwargs={"scale": scale}).report.passed


def test_a_product_of_two_masks_gets_an_axis() -> None:
    class Pairs(nn.Module):
        def forward(self, mask: torch.Tensor) -> torch.Tensor:
            return (mask.unsqueeze(-1) * mask.unsqueeze(-2)).unsqueeze(-1)

    ours, _ = ported(Pairs(), torch.randn(2, 4))
    mask = torch.randn(3, 5)
    close(ours(mx.array(mask.numpy())), Pairs()(mask))


def test_new_arrays_of_a_port_in_half_precision_have_the_dtype_of_the_original() -> None:
    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            b = x.shape[0]
            first = torch.cat([x.new_zeros(b, 4), self.fc(x)], 1)
            second = torch.full((b, 4), 0.5, dtype=x.dtype) * self.fc(x)
            return first, second, torch.ones(b, 4) * x, torch.zeros(b, 4, dtype=torch.float32) + x

    x = torch.randn(2, 4)
    port = icenet.port(States(), x, dtype="bf16")
    theirs = States().bfloat16()(x.bfloat16())
    ours = port.module(mx.array(x.numpy()).astype(mx.bfloat16))
    assert [str(a.dtype).rpartition(".")[2] for a in ours] == [str(b.dtype).rpartition(".")[2] for b in theirs]


def test_a_list_of_stacked_values_is_not_the_list_of_their_parts() -> None:
    class Boxes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = []
            for scale in (1.0, 2.0, 3.0):
                y = x * scale
                found.append(torch.stack([y[:, 0] - 1, y[:, 1] + 1, y[:, 2].relu()], -1))
            return torch.cat(found, 1)

    ours, _ = ported(Boxes(), torch.randn(2, 3, 5))
    x = torch.randn(3, 3, 4)
    close(ours(mx.array(x.numpy())), Boxes()(x))
