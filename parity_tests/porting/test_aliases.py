"""Ports of modules that write into a value after an operation that may return it, and not a copy."""

from __future__ import annotations

from collections.abc import Callable

import icenet.blas

import mlx.core as mx
import pytest
import torch
import torch.nn.functional as F
from made_ports import close, ported
from torch import nn

import icenet


class Dropped(nn.Module):
    """In evaluation mode, and without a probability, a dropout returns its argument; in training mode it does not."""

    def __init__(self, p: float = 0.2) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.drop = nn.Dropout(p)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = self.linear(x)
        y = self.drop(h)
        y += x
        a = torch.tanh(h)
        b = F.dropout1d(a, 0.3, self.training)
        b[:, 1:] = 2.0
        return y * h, a, b


@pytest.mark.parametrize("p", [0.2, 0.0])
def test_writes_into_the_result_of_a_dropout(p: float) -> None:
    port = icenet.port(Dropped(p), torch.randn(3, 4))  # the proof compares both modes
    assert {check.mode for check in port.report.checks} == {"evaluation", "training"}
    module, x = Dropped(p).eval(), torch.randn(3, 4)
    model, _ = ported(module, x)
    for ours, theirs in zip(model.eval()(mx.array(x.numpy())), module(x), strict=True):
        close(ours, theirs)


class Views(nn.Module):
    """Writes into a view of a value, and reads both and another view of the value."""

    def __init__(self, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.view = view

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = torch.sin(x)
        other = h[:2]
        y = self.view(h)
        y[..., 0] = 5.0
        h[1] *= 2
        return y, h, other + 1


VIEWS = [
    lambda h: +h,
    lambda h: h.to(torch.float32).contiguous().type_as(h),
    lambda h: h.ravel(),
    lambda h: h.sum_to_size(4, 4),
    lambda h: torch.atleast_3d(h),
    lambda h: h.H,
    lambda h: h.movedim(0, 1),
    lambda h: h.unfold(0, 2, 2),
    lambda h: h.as_strided((2, 3), (4, 1), 4),
    lambda h: h.hsplit(2)[1],
    lambda h: h.tensor_split(3)[2],
    lambda h: torch.view_as_complex(h.view(4, 2, 2)),
    lambda h: h.view(torch.int32),
    lambda h: h.permute(0, 1).clone(),
    lambda h: torch.cat([h]),
    lambda h: h.t().reshape(16),  # a copy
]


@pytest.mark.parametrize("number", range(len(VIEWS)))
def test_writes_into_a_view(number: int) -> None:
    module, x = Views(VIEWS[number]), torch.randn(4, 4)
    with torch.no_grad():
        expected = module(x)
    model, _ = ported(module, x)
    given = mx.array(x.numpy())
    with torch.no_grad():
        for ours, theirs in zip(model(given), expected, strict=True):
            close(ours, theirs)
    close(given, x)  # the argument is not written


class Expanded(nn.Module):
    """An array that a function may return is not written in place while its result is read later."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = x * 2
        wide = h.expand(4, 4)
        wide[-2:] = wide[-2:] * 3
        kept = torch.cat([h])
        wide[:, ::2] = 0.5
        wide[1] = wide.sum()
        return h, kept, h.as_strided((2, 3), (4, 1))


def test_a_write_after_an_operation_that_returns_its_argument() -> None:
    module, x = Expanded(), torch.randn(4, 4)
    model, _ = ported(module, x)
    for ours, theirs in zip(model(mx.array(x.numpy())), module(x), strict=True):
        close(ours, theirs)


def test_a_tensor_that_is_given_twice_is_two_inputs() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 5)

        def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.embedding(ids), targets)

    module, ids = Loss(), torch.tensor([1, 4, 2])
    model = icenet.port(module, (ids, ids)).module
    targets = torch.tensor([0, 3, 3])
    close(model(mx.array(ids.numpy()), mx.array(targets.numpy())), module(ids, targets))
