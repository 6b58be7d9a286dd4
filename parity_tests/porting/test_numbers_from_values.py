"""Ports whose sizes come from values: of buffers that hold one integer, and of inputs."""

from __future__ import annotations

import icenet.blas

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import is_one_line
from made_ports import close, ported
from torch import nn

import icenet
from icenet.core.errors import PortError
from icenet.parity.ports.limits import Guard, find_limits


class Causal(nn.Module):
    """A convolution that keeps its stride and its kernel as buffers, and pads by arithmetic of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3, stride=2)
        self.register_buffer("kernel", torch.tensor(3))
        self.register_buffer("stride", torch.tensor(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames = torch.ceil((x.shape[-1] - self.kernel) / self.stride + 1).to(torch.int64) - 1
        return self.conv(F.pad(x, (self.kernel // 2, frames * self.stride + self.kernel - x.shape[-1])))


def test_a_buffer_of_one_integer_may_be_a_size() -> None:
    module = Causal()
    port = icenet.port(module, torch.randn(2, 1, 10))
    assert any(is_one_line(note, "constants of the port", "kernel = 3") for note in port.report.notes)
    x = torch.randn(3, 1, 10)
    close(port.module(mx.array(x.numpy())), module(x))
    assert sorted(module.state_dict()) == ["conv.bias", "conv.weight", "kernel"]
    assert int(port.module.kernel) == 3


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        return F.pad(x, (0, self.calls))


def test_a_buffer_that_a_call_changes_is_state() -> None:
    module = Counted()
    model, _ = ported(module, torch.randn(2, 3))
    x = torch.randn(2, 3)
    for training in (False, True, True):
        close(model.train(training)(mx.array(x.numpy())), module.train(training)(x))
    assert int(model.calls) == int(module.calls) == 4


class Lengths(nn.Module):
    """A mean over the part of each row that its length says."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(lengths.max())
        mask = (steps[None] < lengths[:, None]).float()
        return x.sum(1, keepdim=True) * mask / lengths.max().item()


def test_the_largest_of_lengths_may_be_a_size() -> None:
    module = Lengths()
    model, source = ported(module, torch.randn(3, 8), torch.tensor([2, 4, 3]))
    for lengths in ([2, 4, 3], [1, 7]):
        x, given = torch.randn(len(lengths), 5), torch.tensor(lengths)
        close(model(mx.array(x.numpy()), mx.array(given.numpy())), module(x, given))
    assert ".item()" in source


class Cut(nn.Module):
    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return x[:, : int(lengths.max())]


def test_a_size_that_an_export_does_not_know_is_named() -> None:
    with pytest.raises(PortError) as error:
        icenet.port(Cut(), (torch.randn(3, 8), torch.tensor([2, 4, 3])))
    assert is_one_line(error.value, "x[:, : int(lengths.max())]", "a size depends on the values", "as an argument")


class Clipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.fc.weight.clamp_(-0.1, 0.1)
        return self.fc(x)


def test_a_parameter_that_a_call_changes_is_named() -> None:
    module = Clipped()
    port = icenet.port(module, torch.randn(3, 4))
    assert any(is_one_line(note, "clamp_(-0.1, 0.1)", "fc.weight", "in place") for note in port.report.notes)
    assert {check.mode for check in port.report.checks} == {"evaluation"}


class Moved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.fc = self.fc.to(x.dtype)
        return self.fc(x)


def test_a_layer_may_be_moved_to_the_dtype_that_it_has() -> None:
    module, x = Moved(), torch.randn(3, 4)
    close(ported(module, x)[0](mx.array(x.numpy())), module(x))


def test_conditions_beyond_the_number_of_tries_are_counted() -> None:
    guards = [Guard(f"s0 != {size}", {"s0": ((0, 0),)}) for size in range(10, 60)]
    found = find_limits(((np.zeros(8),), {}), guards, lambda given: True, lambda given: True)
    assert found.untried == 10 and not found.ranges and not found.guards
