"""RMS norms that the original writes as a formula: the port has MLX's function, or its layer."""

from __future__ import annotations

from collections.abc import Callable

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import numpy as np
import pytest
import torch
from made_ports import close, ported
from torch import nn


class LlamaNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + 1e-6)
        return self.weight * hidden_states.to(dtype)


class GemmaNorm(LlamaNorm):
    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.float()) * (1.0 + self.weight.float())


class DividedNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(dim=2, keepdim=True) + 0.1) + 1


class PowerNorm(LlamaNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.pow(x.pow(2).mean(-1, keepdim=True) + 0.1, -0.5) * x * self.weight * 2


class Variance(nn.Module):
    """Returns a part of the formula, too."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        variance = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(variance + 1e-6), variance


class OtherAxis(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


class Scaled(nn.Module):
    """A norm as a layer of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), LlamaNorm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x)).exp()


@pytest.mark.parametrize(
    ("module", "written"),
    [
        (LlamaNorm(), "return mx.fast.rms_norm(hidden_states, self.weight, 1e-6)"),
        (GemmaNorm(), "return mx.fast.rms_norm(x, self.weight + 1.0, 1e-5)"),
        (DividedNorm(), "return mx.fast.rms_norm(x, None, 0.1) + 1"),
        (PowerNorm(), "return mx.fast.rms_norm(x, self.weight, 0.1) * 2"),
        (Scaled(), "self.norm = nn.RMSNorm(8, eps=1e-6)"),
        (OtherAxis(), "mx.rsqrt("),
    ],
    ids=lambda item: type(item).__name__ if isinstance(item, nn.Module) else "",
)
def test_a_formula_of_an_rms_norm_is_the_function_of_mlx(module: nn.Module, written: str) -> None:
    module = module.eval()
    model, source = ported(module, torch.randn(2, 5, 8))
    assert written in source, source
    assert "LlamaNorm" not in source or isinstance(module, LlamaNorm)
    for B, T in ((2, 5), (1, 1), (3, 9)):
        x, factor = torch.randn(B, T, 8, requires_grad=True), torch.randn(B, T, 8)
        y = module(x)
        close(model(mx.array(x.detach().numpy())), y)
        y.backward(factor)
        _, gradients = mx.vjp(model, [mx.array(x.detach().numpy())], [mx.array(factor.numpy())])
        assert x.grad is not None
        close(gradients[0], x.grad)


def test_a_norm_of_which_a_part_is_a_result_stays() -> None:
    x = torch.randn(2, 5, 8)
    model, source = ported(Variance(), x)
    assert "rms_norm" not in source
    for ours, theirs in zip(model(mx.array(x.numpy())), Variance()(x), strict=True):
        close(ours, theirs)


def root(x: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 0.1)


OTHERS = {
    "twice eps": lambda x, w: x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 0.1, alpha=2)),
    "squares of another value": lambda x, w: x / root(x + 1),
    "rounded": lambda x, w: torch.div(x, root(x), rounding_mode="floor"),
    "means of rows for columns": lambda x, w: x @ (w * torch.rsqrt(w.pow(2).mean(-1) + 0.1)),
}
"""Formulas that are nearly an RMS norm."""
MULTIPLIED = {
    "by its input": lambda x, w: x / root(x) * x,
    "and added": lambda x, w: (y := x / root(x)) * w[0] + y,
}


class Formula(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(8, 8)), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight)


@pytest.mark.parametrize("name", [*OTHERS, *MULTIPLIED])
def test_another_formula_is_no_rms_norm_and_another_product_no_weight(name: str) -> None:
    module, x = Formula((OTHERS | MULTIPLIED)[name]).eval(), torch.randn(2, 5, 8)
    model, source = ported(module, x)
    assert "rms_norm(x, None, 0.1)" in source if name in MULTIPLIED else "rms_norm" not in source, source
    close(model(mx.array(x.numpy())), module(x))


def test_the_weight_of_a_norm_in_bfloat16_is_applied_after_rounding() -> None:
    module, x = LlamaNorm().bfloat16(), torch.randn(2, 5, 8).bfloat16()
    model, source = ported(module, x)
    assert "mx.fast.rms_norm(hidden_states" in source and ", None, 1e-6)" in source, source
    ours = model(mx.array(x.float().numpy()).astype(mx.bfloat16)).astype(mx.float32)
    np.testing.assert_array_equal(np.array(ours), module(x).float().detach().numpy())
