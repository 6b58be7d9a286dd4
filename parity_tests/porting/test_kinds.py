"""Helper functions of a port without the branches for other axes and dtypes than those of their calls."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import pytest
import torch
import torch.nn.functional as F
from made_ports import close, ported
from torch import nn


class Routed(nn.Module):
    """Expert choice: the best two scores, and what is gathered and scattered at them."""

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values, index = x.topk(2, dim=-1)
        gates = torch.zeros_like(x).scatter(-1, index, values.softmax(-1))
        total = torch.zeros_like(x).scatter_add(1, rows[:, :, None].expand(-1, -1, x.shape[2]), x)
        best = x[:, :, 0].argmax(1, keepdim=True)
        row = x.gather(1, best[:, :, None].expand(-1, -1, x.shape[2]))
        return gates, total, row, x.gather(-1, index)


def test_branches_on_axes_and_dtypes_are_folded() -> None:
    x, rows = torch.randn(3, 4, 6), torch.randint(0, 4, (3, 4))
    model, source = ported(Routed(), x, rows)
    for ours, theirs in zip(model(mx.array(x.numpy()), mx.array(rows.numpy())), Routed()(x, rows), strict=True):
        close(ours, theirs)
    for text in ("ndim == 0", "mx.bool_", "uint8", "isinstance", "amax", "multiply_at", "def gather("):
        assert text not in source, text
    assert "def topk" in source
    assert "def scatter" in source


class Both(nn.Module):
    """One helper for arrays of two kinds keeps the branch that tells them apart."""

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.div(x, 0.3, rounding_mode="floor"), torch.div(i, 2, rounding_mode="floor"), x[0, 0].topk(1)[0]


def test_calls_with_arrays_of_two_kinds_keep_the_branch() -> None:
    x, i = torch.randn(3, 4), torch.randint(-9, 9, (3, 4))
    model, source = ported(Both(), x, i)
    assert "mx.integer" in source
    for ours, theirs in zip(model(mx.array(x.numpy()), mx.array(i.numpy())), Both()(x, i), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("floating", [False, True])
def test_a_division_has_one_branch(floating: bool) -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.div(x, 2, rounding_mode="floor")

    x = torch.randn(3, 4) if floating else torch.randint(-9, 9, (3, 4))
    model, source = ported(Halves(), x)
    close(model(mx.array(x.numpy())), Halves()(x))
    assert "mx.issubdtype" not in source
    assert "isinstance" not in source
    assert ("fmod" in source) == floating


class Spectrum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.fft.rfft2(x, norm="ortho")
        return F.softplus(torch.fft.irfft2(y, s=(4, 6), norm="ortho"))


def test_norms_of_transforms_and_softplus_are_those_of_mlx() -> None:
    x = torch.randn(2, 4, 6)
    model, source = ported(Spectrum(), x)
    assert 'norm="ortho"' in source
    assert "nn.softplus(" in source
    assert "def " not in source.split("class Spectrum")[0]
    close(model(mx.array(x.numpy())), Spectrum()(x))
