"""Sequences that differ in numbers and activations only are calls of one function in the source of a port."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import torch
from made_ports import close, ported
from torch import nn

from icenet.core.porting.source.instances import Class
from icenet.core.porting.source.sequences import functions


class ConvNorm(nn.Sequential):
    """A class of sequences, as torchvision's Conv2dNormActivation."""

    def __init__(self, channels: int, out: int, act: type[nn.Module], stride: int | tuple[int, int] = 1) -> None:
        super().__init__(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), act())


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(ConvNorm(size, size, nn.SiLU), ConvNorm(size, 2 * size, nn.ReLU, stride=(2, 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) * 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 4, nn.ReLU, stride=2)
        self.blocks = nn.Sequential(Block(4), Block(8))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(16, n), nn.Tanh(), nn.Linear(n, 2)) for n in (5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x)).mean((2, 3))
        return sum(head(x) for head in self.heads)


def test_repeated_sequences_are_calls_of_a_function() -> None:
    torch.manual_seed(0)
    theirs, x = Net().eval(), torch.randn(2, 3, 16, 16)
    ours, source = ported(theirs, x)
    close(ours(mx.array(x.numpy())), theirs(x))
    assert "def conv_norm(in_channels, out_channels, activation, stride=1):" in source, source
    assert "self.stem = conv_norm(3, 4, nn.ReLU, stride=2)" in source
    assert "conv_norm(channels, out_channels, nn.ReLU, stride=(2, 1))" in source.replace("in_channels", "channels")
    assert "self.heads = [linear_block(5), linear_block(6)]" in source and "ConvNorm" not in source.split("class")[-1]
    fresh = type(ours)()
    assert fresh.blocks[1].layers[1][0].stride == (2, 1) and fresh.heads[1][2].weight.shape == (2, 6)
    ours.update(fresh.parameters())  # the same tree


def test_a_function_must_save_layers() -> None:
    pair = "Sequential([nn.Linear(2, 3), nn.ReLU()])"
    classes = [Class("Net", [f"self.a = {pair}", "self.b = Odd([nn.ReLU()])", f"self.c = {pair}"])]
    assert functions(classes, {"Sequential", "Odd"}, set()) == []
    assert classes[0].init[:2] == [f"self.a = {pair}", "self.b = Sequential([nn.ReLU()])"]
    pools = "Sequential([nn.MaxPool2d(2, stride=1), nn.AvgPool2d(3), nn.MaxPool2d(2)])"
    other = pools.replace(", stride=1", "")  # of which the stride is 2
    classes = [Class("Net", [f"self.a = {pools}", f"self.b = {other}"])]
    assert functions(classes, {"Sequential"}, set()) == []


class Dense(nn.Sequential):
    """A class of sequences of one layer, which is too short for a function."""


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {f"of_{n}": nn.Sequential(Dense(nn.Linear(3, n)), nn.ReLU(), nn.Linear(n, 2)) for n in (4, 5, 6)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads["of_4"](x) + self.heads["of_5"](x) + self.heads["of_6"](x)


def test_a_function_holds_sequences_of_other_classes() -> None:
    torch.manual_seed(0)
    theirs, x = Heads().eval(), torch.randn(2, 3)
    ours, source = ported(theirs, x)
    close(ours(mx.array(x.numpy())), theirs(x))
    assert "return Sequential([Sequential([nn.Linear(3, output_dims)]), nn.ReLU()," in source, source
