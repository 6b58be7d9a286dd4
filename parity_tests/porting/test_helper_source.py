"""Helper functions of a port have what its calls need: no branches, variables and factors that none of them has."""

from __future__ import annotations

import re

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import pytest
import torch
import torch.nn.functional as F
from made_ports import close, ported
from torch import nn


class Losses(nn.Module):
    def forward(self, x: torch.Tensor, p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(x, ids, ignore_index=0) + F.binary_cross_entropy(p, torch.sigmoid(x), reduction="sum")
        return loss + F.elu(x).sum()


class Biased(nn.Module):
    def __init__(self, grouped: bool = False) -> None:
        super().__init__()
        self.grouped = grouped

    def forward(self, q: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        k = q[:, :2] if self.grouped else q
        p = 0.5 if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, k, bias, p, scale=0.5, enable_gqa=self.grouped)


def test_helpers_have_no_dead_code() -> None:
    values = (torch.randn(4, 3), torch.rand(4, 3), torch.tensor([0, 1, 2, 1]))
    ours, source = ported(Losses(), *values)
    close(ours(*(mx.array(value.numpy()) for value in values)), Losses()(*values))
    assert "_reduced" not in source and "classes" not in source.replace("classes are", "").replace("the classes", "")
    assert not re.search(r"(\w+) = [^\n]*\n    return \1\n", source), source
    assert "def elu(x):" in source and "mx.expm1(mx.where(negative, x, 0)), x)" in source


@pytest.mark.parametrize("grouped", [False, True])
def test_attention_has_the_branches_of_its_calls(grouped: bool) -> None:
    q, bias, theirs = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 3), Biased(grouped).eval()
    ours, source = ported(theirs, q, bias)
    close(ours(mx.array(q.numpy()), mx.array(bias.numpy())), theirs(q, bias))
    body = source.partition("def attention(")[2].partition("\n\n\n")[0]
    assert body.startswith("q, k, v, mask, scale, dropout=0.0):")  # the evaluation mode gives none
    assert "bernoulli" in body and "is None" not in body and "dtype" not in body, body
    assert ("mx.repeat" in body) == grouped
