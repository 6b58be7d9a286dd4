"""Sizes that an export fixes, or takes for larger than 1, and that a port serves as its original does."""

from __future__ import annotations

import math

import icenet.blas

import mlx.core as mx
import pytest
import torch
import torch.nn.functional as F
from made_ports import close, ported
from torch import nn

import icenet


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.out = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.adaptive_avg_pool2d(self.conv(x), 1).squeeze()).squeeze()


def test_squeeze_leaves_out_a_batch_of_one() -> None:
    theirs = Squeezed().eval()
    port = icenet.port(theirs, torch.randn(3, 3, 6, 6))
    for batch in (1, 2):
        x = torch.randn(batch, 3, 6, 6)
        ours = port.module(mx.array(x.numpy()))
        assert ours.shape == tuple(theirs(x).shape)
        close(ours, theirs(x))
    assert "keepdims=True).squeeze()).squeeze()" in port.source
    assert not port.report.notes


def test_a_size_of_one_at_which_the_original_is_another_is_a_limit() -> None:
    class Turned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.squeeze(0).sum(-1)

    port = icenet.port(Turned(), torch.randn(3, 4))
    assert any("x has at least 2 in dimension 0" in note for note in port.report.notes)
    with pytest.raises(ValueError, match="x has 1 in dimension 0; the port was made for at least 2"):
        port.module(mx.zeros((1, 4)))


def test_the_length_of_a_max_pool_is_open() -> None:
    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 2, padding=1)
            self.pool = nn.MaxPool1d(2, stride=1, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.pool(self.conv(x)[:, :, : x.shape[2]])[:, :, : x.shape[2]]
            return F.max_pool1d(x, 3, 2, ceil_mode=True)

    theirs = Bank()
    model, source = ported(theirs, torch.randn(2, 4, 7))
    assert "indices" not in source
    for length in (5, 12):
        x = torch.randn(3, 4, length)
        close(model(mx.array(x.numpy())), theirs(x))


def test_counts_of_a_known_size_need_no_values() -> None:
    class Degrees(nn.Module):
        def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return x / torch.bincount(rows, minlength=x.shape[0]).clamp(min=1).unsqueeze(1)

    model, _ = ported(Degrees(), torch.randn(5, 3), torch.randint(0, 5, (8,)))
    x, rows = torch.randn(7, 3), torch.randint(0, 7, (9,))
    close(mx.compile(model)(mx.array(x.numpy()), mx.array(rows.numpy())), Degrees()(x, rows))


def test_a_distribution_does_not_check_values() -> None:
    class Mixture(nn.Module):
        def forward(self, logits: torch.Tensor, mean: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            weights = torch.distributions.Categorical(logits=logits)
            parts = torch.distributions.Normal(mean, torch.ones_like(mean)).log_prob(y.unsqueeze(1))
            return torch.logsumexp(parts + weights.probs.log(), 1) + weights.entropy()

    given = torch.randn(3, 2), torch.randn(3, 2), torch.randn(3)
    model, _ = ported(Mixture(), *given)
    close(model(*(mx.array(x.numpy()) for x in given)), Mixture()(*given))
    with pytest.raises(ValueError, match="constraint"):  # the checks are on again
        torch.distributions.Normal(torch.zeros(1), -torch.ones(1))


def test_the_root_of_a_size_is_open() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ x.mT / math.sqrt(x.size(1))).softmax(-1)

    model, source = ported(Attention(), torch.randn(3, 5, 4))
    assert "math.sqrt(x.shape[1])" in source
    x = torch.randn(2, 7, 4)
    close(model(mx.array(x.numpy())), Attention()(x))


def test_sizes_that_scale_gradients_alone_are_limits() -> None:
    class Scaled(nn.Module):
        """The step of LSQ: its gradient is divided by a function of the number of values."""

        def __init__(self) -> None:
            super().__init__()
            self.size = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = 1 / math.log(x.numel())
            return x * ((self.size - self.size * scale).detach() + self.size * scale)

    port = icenet.port(Scaled(), torch.randn(3, 4))
    assert any("x.shape[1] * x.shape[0] == 12" in note for note in port.report.notes)


class Kernels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.conv(x)).mean((2, 3))


def test_images_smaller_than_a_kernel_are_an_error_as_in_pytorch() -> None:
    port = icenet.port(Kernels(), torch.randn(2, 3, 8, 9))
    x = torch.randn(2, 3, 4, 4)
    close(port.module(mx.array(x.numpy())), Kernels.forward(icenet.to_torch(port.module, Kernels()), x))
    for height, width in ((3, 8), (8, 2)):
        with pytest.raises(ValueError, match=r"x has \d in dimension \d; the port was made for at least 4"):
            port.module(mx.zeros((2, 3, height, width)))


def test_a_row_that_the_input_lacks_is_an_error_as_in_pytorch() -> None:
    class Fourth(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, 3] * 2

    module = icenet.port(Fourth(), torch.randn(2, 6)).module
    close(module(mx.ones((2, 4))), torch.full((2,), 2.0))
    with pytest.raises(ValueError, match="x has 3 in dimension 1; the port was made for at least 4"):
        module(mx.ones((2, 3)))


class Line(nn.Module):
    """The features of a line of text, whose height a convolution makes 1."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.conv = nn.MaxPool2d((2, 1)), nn.Conv2d(3, 4, (2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.pool(x))
        assert x.shape[2] == 1
        return x.squeeze(2).permute(2, 0, 1)


def test_a_formula_of_an_open_size_that_is_one_is_left_out() -> None:
    x = torch.randn(2, 3, 4, 9)
    model, _ = ported(Line(), x)
    theirs = Line()
    close(icenet.from_torch(theirs, model)(mx.array(x.numpy())), theirs(x))
