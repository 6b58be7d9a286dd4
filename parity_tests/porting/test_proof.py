"""The proof of `icenet.port` on modules that are hard to compare: state, precisions, gradients that are zero."""

from __future__ import annotations

from typing import Any

import icenet.blas

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import icenet

R = torch.randn


class Counter(nn.Module):
    """Updates its buffers in each call, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("n", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(2, 8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n += 1
        self.cache[:, :3] = self.fc(x).detach()
        return self.fc(x) * self.n + self.cache.sum()


class Calls(nn.Module):
    """Counts its calls, and takes any size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n += 1
        return self.fc(x) * self.n


class Codebook(nn.Module):
    """A codebook whose exponential moving average a call in training mode updates before it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.5).add_(x.mean(0), alpha=0.5)
        return x * self.mean.clone()


class NamesFloat32(nn.Module):
    """The embedding of time of a diffusion model, and a softmax in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.offset = torch.full((4,), 0.5)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(-torch.arange(4, dtype=torch.float32) / 4)
        angles = t[:, None].float() * frequencies * torch.tensor([1.0, 2.0, 1.0, 0.5], dtype=torch.float32)
        x = self.fc(torch.cat([angles.sin(), angles.cos()], -1))
        return F.linear(F.softmax(x, dim=-1, dtype=torch.float32), torch.eye(4, dtype=torch.float32), self.offset)


class Spectral(nn.Module):
    """A product with complex weights of the Fourier transform."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(R(2, 3, 4, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.einsum("bik,iok->bok", torch.fft.rfft(x)[..., :4], self.weight)
        return torch.fft.irfft(spectrum, n=x.shape[-1])


class WithoutParameters(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


class ZeroGradient(nn.Module):
    """A softmax along the axis on which `b` is constant: the gradient of `b` is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(R(6))
        self.b = nn.Parameter(R(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = (x * self.a).sum(-1) + (x[:, :1] * self.b).sum(-1)
        return torch.softmax(scores, -1)[..., None] * x


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 3)), nn.Tanh())


CASES: dict[str, tuple[Any, tuple[torch.Tensor, ...]]] = {
    "a counter and a cache": (Counter, (R(2, 3, 4),)),
    "a counter": (Calls, (R(3, 4),)),
    "a moving average in training": (Codebook, (R(3, 4),)),
    "float32 by name": (NamesFloat32, (torch.arange(1, 4),)),
    "complex weights": (Spectral, (R(2, 2, 8),)),
    "no parameters": (WithoutParameters, (R(3, 4),)),
    "a gradient of zero": (ZeroGradient, (R(3, 5, 6),)),
    "bf16": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()).bfloat16(), (R(3, 4).bfloat16(),)),
    "float64": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double(), (R(3, 4).double(),)),
    "weight norm": (old_weight_norm, (R(3, 4),)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_module_is_compared_and_stays_as_it_is(name: str) -> None:
    kind, example = CASES[name]
    torch.manual_seed(0)
    module = kind()
    before = {path: value.clone() for path, value in module.state_dict().items()}
    port = icenet.port(module, example)
    assert all(torch.equal(value, before[path]) for path, value in module.state_dict().items())
    gradients = [check for check in port.report.checks if check.what == "gradients"]
    assert len(gradients) == 2 and all(check.name != "no output" for check in gradients), str(port.report)
    assert not any("not compared" in note for note in port.report.notes)
    for _ in range(2):  # a module with state returns something else in the second call
        ours = port.module(
            *[
                mx.array(item.float().numpy())
                if item.is_floating_point()
                else mx.array(item.numpy()).astype(mx.int32)
                for item in example
            ]
        )
        with torch.no_grad():
            theirs = module.eval()(*example).float().numpy()
        np.testing.assert_allclose(np.array(ours.astype(mx.float32)), theirs, atol=0.02 if name == "bf16" else 1e-5)
