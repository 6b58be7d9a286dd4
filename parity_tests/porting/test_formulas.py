"""Formulas that a port writes as functions of MLX: activations, and attention with a mask."""

from __future__ import annotations

import math

import icenet.blas  # before mlx: it decides which BLAS MLX finds

import mlx.core as mx
import numpy as np
import torch
from torch import nn

import icenet


class Formulas(nn.Module):
    """Activations as formulas: 0.5 x (1 + tanh(...)) in a module, and others in the function."""

    class Gelu(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), self.Gelu()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.act(self.linear(x))
        z = 2 * y
        quick = z * torch.sigmoid(1.702 * z)
        exact = y * (torch.erf(y / math.sqrt(2.0)) + 1) / 2
        gate = torch.sigmoid(x)
        return quick, exact * torch.sigmoid(exact), x * gate, gate, 0.6 * x * torch.sigmoid(x), x * torch.tanh(x)


def test_a_formula_of_an_activation_is_the_function_of_mlx() -> None:
    torch.manual_seed(0)
    source = icenet.port(Formulas(), torch.randn(3, 4)).source
    assert 'self.act = nn.GELU(approx="tanh")' in source
    for function in ("gelu_fast_approx", "gelu", "silu"):
        assert source.count(f"nn.{function}(") == 1
    assert "gate = mx.sigmoid(x)" in source  # a part that is a result stays
    assert source.count("mx.tanh(") == 1


class MaskedAttention(nn.Module):
    """Attention with a mask of booleans, of which a row is False."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        B, T, _ = x.shape
        q, k, v = self.linear(x).view(B, T, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_attention_with_a_mask_is_fused() -> None:
    torch.manual_seed(0)
    mask = torch.rand(2, 1, 5, 5) > 0.3
    mask[1, :, 2] = False
    x = torch.randn(2, 5, 8)
    original = MaskedAttention()
    port = icenet.port(original, (x, mask))
    assert "mx.fast.scaled_dot_product_attention" in port.source
    y = np.array(port.module(mx.array(x.numpy()), mx.array(mask.numpy())))
    assert not y[1, :, 2].any()
    np.testing.assert_allclose(y, original(x, mask).detach().numpy(), atol=1e-6)


class DroppedAttention(MaskedAttention):
    """The same with dropout in training."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        B, T, _ = x.shape
        q, k, v = self.linear(x).view(B, T, 3, 2, 4).permute(2, 0, 3, 1, 4)
        dropout = 0.5 if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def test_attention_with_dropout_in_training_only() -> None:
    port = icenet.port(DroppedAttention(), (torch.randn(2, 5, 8), torch.ones(2, 1, 5, 5, dtype=torch.bool)))
    assert port.source.count("mx.fast.scaled_dot_product_attention") == 1
    assert {check.mode for check in port.report.checks} == {"evaluation", "training"}
    x, mask = mx.ones((1, 5, 8)), mx.ones((1, 1, 5, 5), mx.bool_)
    assert mx.array_equal(port.module(x, mask), port.module(x, mask))
    port.module.train()
    assert not mx.array_equal(port.module(x, mask), port.module(x, mask))
