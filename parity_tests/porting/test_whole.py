"""Ports of what PyTorch exports with help only: the inverse STFT, grouped products, sizes that are tensors."""

from __future__ import annotations

from typing import Any

import icenet.blas

import mlx.core as mx
import pytest
import torch
from made_ports import close, ported
from torch import nn

import icenet


class Spectrum(nn.Module):
    """A gain for each frequency of a signal."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.window = nn.Buffer(torch.hamming_window(options.get("win_length", 12)))
        self.gain = nn.Parameter(torch.rand(16))
        self.options = {"n_fft": 16, "hop_length": 4, "win_length": 12, **options}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(x, window=self.window, return_complex=True, **self.options)
        spectrum = spectrum * self.gain[: spectrum.shape[1], None]
        return torch.istft(spectrum, window=self.window, length=x.shape[-1], **self.options)


@pytest.mark.parametrize("options", [{}, {"normalized": True}, {"onesided": False}, {"center": False}])
def test_the_inverse_of_a_short_time_fourier_transform(options: dict[str, Any]) -> None:
    if options.get("center") is False:
        options = {**options, "win_length": 16}  # the window has no zeros
    module, x = Spectrum(**options), torch.randn(2, 51, requires_grad=True)
    model, _ = ported(module, torch.randn(2, 48))  # the length is open
    expected, weight = module(x), torch.randn(2, 51)
    (expected * weight).sum().backward()
    given, factor = mx.array(x.detach().numpy()), mx.array(weight.numpy())
    close(model(given), expected)
    assert x.grad is not None
    close(mx.grad(lambda signal: (model(signal) * factor).sum())(given), x.grad)


class Experts(nn.Module):
    """Each token goes through the matrix of one expert; an expert may get none."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(4, 8, 12))

    def forward(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        expert, order = torch.sort(expert, stable=True)
        ends = torch.searchsorted(expert, torch.arange(4), right=True).to(torch.int32)
        rows = torch.nn.functional.grouped_mm(x[order], self.weights, offs=ends)
        return torch.zeros_like(rows).index_add(0, order, rows)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch has no grouped_mm")
def test_products_of_groups() -> None:
    port = icenet.port(Experts(), (torch.randn(6, 8), torch.tensor([2, 0, 2, 3, 0, 2])))
    assert "gradients" in {check.what for check in port.report.checks}


class Positions(nn.Module):
    def forward(self, length: int) -> torch.Tensor:
        return torch.arange(length) * 0.5 + length


class FixedSize(nn.Module):
    """The layer fixes a size that another module has as its only argument."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = Positions()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        position = self.positions(x.shape[-1])
        return self.linear(x + position)


def test_a_module_whose_only_argument_is_a_size_that_is_fixed() -> None:
    module, x = FixedSize(), torch.randn(3, 6)
    model, _ = ported(module, x)
    close(model(mx.array(x.numpy())), module(x))


class SizesAsTensors(nn.Module):
    """Sizes that go through a tensor, as in DeBERTa and Longformer, are those of the example."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        span = torch.tensor(min(x.shape[1], 8))
        parts = x.reshape(x.shape[0], torch.div(x.shape[1], 2, rounding_mode="trunc"), 2, 4)
        return parts.sum(2), self.table[8 - span : 8 + span]


def test_a_size_that_is_a_tensor() -> None:
    module = SizesAsTensors()
    model, _ = ported(module, torch.randn(2, 6, 4))
    x = torch.randn(5, 6, 4)  # the batch is open
    for ours, theirs in zip(model(mx.array(x.numpy())), module(x), strict=True):
        close(ours, theirs)


class UnreadHead(nn.Module):
    """A head whose result is not returned, as an auxiliary one without labels, updates its statistics in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.head = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.head(x)
        return self.layer(x)


def test_statistics_of_a_module_whose_result_is_not_read() -> None:
    module, x = UnreadHead(), torch.randn(6, 4)
    model, _ = ported(module, x)
    model.train()(mx.array(x.numpy()))
    module.train()(x)
    for number in (1, 3):
        theirs = module.head[number]
        close(model.head[number].running_mean, theirs.running_mean)
        close(model.head[number].running_var, theirs.running_var)
