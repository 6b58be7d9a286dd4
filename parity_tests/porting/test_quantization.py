"""Training that knows of a quantization, and integers whose bits an operation changes in place."""

from __future__ import annotations

import icenet.blas

import mlx.core as mx
import torch
from made_ports import close, ported
from torch import nn

import icenet


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, zero = self.layer.weight, torch.zeros(4, dtype=torch.int32)
        scale = weight.detach().abs().amax(1) / 7
        y = nn.functional.linear(x, torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -8, 7))
        return torch.fake_quantize_per_tensor_affine(y, 0.03, 2, -20, 20)


def test_values_are_rounded_and_gradients_pass_within_the_range() -> None:
    theirs = Quantized()
    port = icenet.port(theirs, torch.randn(5, 6))
    assert {check.what for check in port.report.checks} >= {"outputs", "gradients"}
    x = torch.randn(7, 6)
    close(port.module(mx.array(x.numpy())), theirs(x))


def test_bits_are_changed_in_place() -> None:
    class Hash(nn.Module):
        def forward(self, i: torch.Tensor) -> torch.Tensor:
            found = torch.zeros_like(i)[..., 0]
            for axis, prime in enumerate((1, 2654435761)):
                found ^= i[..., axis] * prime
            found &= 1023
            found |= 4
            found <<= 2
            found >>= 1
            return found

    i = torch.randint(-50, 50, (3, 4, 2))
    model, _ = ported(Hash(), i)
    assert model(mx.array(i.numpy())).tolist() == Hash()(i).tolist()
