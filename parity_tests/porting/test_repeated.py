"""Arguments of one class that are one array in some calls and several in others: self- and cross-attention."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import torch
from made_ports import close, ported
from torch import nn


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        weights = self.q(query) @ self.k(key).transpose(-1, -2)
        if mask is not None:
            weights = weights.masked_fill(mask == 0, -1e9)
        return weights.softmax(-1) @ self.v(value)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.self_attn, self.cross_attn = nn.LayerNorm(8), Attention(), Attention()

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], device=x.device).tril()
        everything = torch.ones(1, memory.shape[1], device=x.device)
        x = x + self.self_attn(*[self.norm(x)] * 3, mask)
        return x + self.cross_attn(x, memory, memory, everything)


class Alone(nn.Module):
    """Attention with one array only: its class takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x).exp()


class Changed(nn.Module):
    """A class that changes an argument in place, which shows in the other one where both are one array."""

    class Sum(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            a.mul_(3)
            return a + b

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.Sum(), self.Sum()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        z = self.first(y, y)
        return self.second(z, y) + y


def test_self_and_cross_attention_are_one_class() -> None:
    module = Decoder().eval()
    model, source = ported(module, torch.randn(2, 3, 8), torch.randn(2, 5, 8))
    assert source.count("class Attention") == 1 and "(self, query, key, value, mask)" in source, source
    assert "self.cross_attn(x, memory, memory, " in source and "self.self_attn(norm, norm, norm, " in source
    for B, T, S in ((2, 3, 5), (1, 7, 2)):
        x, memory, factor = torch.randn(B, T, 8, requires_grad=True), torch.randn(B, S, 8), torch.randn(B, T, 8)
        y = module(x, memory)
        y.backward(factor)
        given = [mx.array(x.detach().numpy()), mx.array(memory.numpy())]
        (ours,), gradients = mx.vjp(model, given, [mx.array(factor.numpy())])
        assert x.grad is not None
        close(ours, y)
        close(gradients[0], x.grad)


def test_a_class_that_always_has_one_array_takes_one() -> None:
    _, source = ported(Alone().eval(), torch.randn(2, 3, 8))
    assert "def __call__(self, query):" in source and "self.attention(x)" in source


def test_arguments_that_are_one_array_change_together() -> None:
    x = torch.randn(2, 3)
    model, _ = ported(Changed(), x)
    close(model(mx.array(x.numpy())), Changed()(x))
