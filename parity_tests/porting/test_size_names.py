"""Sizes in the methods of a port have names: attributes of the original, and lengths that are numbers."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import torch
import torch.nn.functional as F
from made_ports import close, ported
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim: int = 12, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scaling = num_heads, dim // num_heads, 0.3
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, scale=self.scaling).transpose(1, 2).reshape(b, t, d)


class Patches(nn.Module):
    """Two attentions over other numbers of tokens, and layers of other classes in a loop."""

    def __init__(self, num_heads: int = 2) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(4, 12))
        self.first, self.second = Attention(num_heads=num_heads), Attention(num_heads=num_heads)
        self.layers = nn.ModuleList([nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.view(x.shape[0], 4, 12) + self.position)
        x = self.second(torch.cat([x, x[:, :1]], 1))
        for layer in self.layers:
            x = layer(x)
        return x[:, None] * x.sum(1)[:, None, None]


def test_sizes_have_the_names_of_attributes_and_axes() -> None:
    for heads in (2, 3):
        theirs, x = Patches(heads).eval(), torch.randn(2, 48)
        ours, source = ported(theirs, x)
        close(ours(mx.array(x.numpy())), theirs(x))
        assert source.count("class Attention") == 1, source  # for both lengths
        assert "B, T, D = x.shape" in source and ".reshape(B, T, D)" in source and "scale=self.scaling" in source
        assert "reshape(B, T, 3, self.num_heads, self.head_dim)" in source  # 3 is also q, k and v
        assert "self.head_dim = dim // num_heads" in source
        assert "for layer in self.layers:\n            x = layer(x)" in source


class Forms(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x.softmax(-1)
        return torch.cat([kept, (kept.transpose(1, 2) * (x > 0).transpose(1, 2)).transpose(1, 2)], 1) + kept.sum()


def test_another_form_of_a_value_has_its_name() -> None:
    x = torch.randn(2, 3, 4)
    ours, source = ported(Forms(), x)
    close(ours(mx.array(x.numpy())), Forms()(x))
    assert "transpose =" not in source and "cat =" not in source and "unsqueeze =" not in source
