"""The proof of `icenet.port` on modules that are hard to compare: state, precisions, gradients that are zero."""

from __future__ import annotations

import re
from typing import Any

import icenet.blas

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import is_one_line
from torch import nn

import icenet
from icenet.core.errors import PortError
from icenet.core.porting.table import TABLE
from icenet.parity.ports.limits import Guard, find_limits

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
    gradients = [check for check in port.report.checks if check.what == "gradients" and check.layers == "mlx"]
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


class Jump(nn.Module):
    """A quotient of numbers that fp32 divides exactly to 10, though it is a little less."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + torch.floor_divide(x, 0.1)


def test_a_jump_is_equal_on_equal_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples of rounding move the quotient over its step, so that only equal inputs tell."""
    torch.manual_seed(0)
    example = torch.tensor([[1.0, 0.3, -0.7, 0.25]])
    assert icenet.port(Jump(), example).report.passed
    monkeypatch.setitem(TABLE, "floor_divide", lambda n: f"mx.floor({n['self']} / {n['other']})")
    with pytest.raises(PortError) as caught:
        icenet.port(Jump(), example)
    assert is_one_line(str(caught.value).splitlines()[0], "aten.floor_divide", "torch.floor_divide(x, 0.1)")


class Statistics(nn.Module):
    """Returns indices and a number in half precision, and updates a mean in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fc(self.norm(x)), x.sum(-1).half()


def test_dtypes_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    assert icenet.port(Statistics(), R(5, 6)).report.passed
    monkeypatch.setitem(TABLE, "to", lambda n: n["self"])
    monkeypatch.setitem(TABLE, "_to_copy", lambda n: n["self"])
    with pytest.raises(PortError) as caught:
        icenet.port(Statistics(), R(5, 6))
    assert "output 1: fp32 instead of fp16" in str(caught.value)


def test_buffers_after_a_training_step_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running statistics change no output of the call."""
    from icenet.core.porting.layers import mlx_layers

    torch.manual_seed(0)
    report = icenet.port(Statistics(), R(5, 6)).report
    assert {check.mode for check in report.checks if check.what == "buffers"} == {"training"}
    original = mlx_layers._MAKERS["BatchNorm1d"]

    def other(settings: dict[str, Any]) -> Any:
        return original({**settings, "momentum": 0.2})

    monkeypatch.setitem(mlx_layers._MAKERS, "BatchNorm1d", other)
    with pytest.raises(PortError) as caught:
        icenet.port(Statistics(), R(5, 6))
    assert is_one_line(str(caught.value).splitlines()[0], "buffer norm.running_", "training mode")


def test_icenets_own_layers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    from icenet.porting import layers

    monkeypatch.setattr(layers.ReLU, "__call__", lambda self, x: mx.maximum(x, 0.01))
    torch.manual_seed(0)  # so that some outputs are below the bound
    with pytest.raises(PortError) as caught:
        icenet.port(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), R(5, 3))
    first = str(caught.value).splitlines()[0]
    assert is_one_line(
        first, "output 0 in evaluation mode", "with IceNet's layers; with those of MLX the port computes"
    )


class Flip(nn.Module):
    """A ReLU whose input is a sum that is zero but for rounding: in fp32 it is on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(R(400))
        self.b = nn.Parameter(R(400))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu((self.a * x).sum(-1) - (self.b * x).sum(-1))


def test_a_sign_within_rounding_does_not_refuse_a_port() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        module = Flip()
        with torch.no_grad():
            module.b.copy_(module.a.flip(0))
        x = R(6, 200)
        assert icenet.port(module, torch.cat([x, x.flip(1)], 1)).report.passed


def test_unusual_sizes_are_compared() -> None:
    torch.manual_seed(0)
    report = icenet.port(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()), R(2, 2, 8, 6)).report
    assert {check.sizes for check in report.checks} >= {"2x2x8x6", "1x2x8x6", "2x2x9x7"}
    report = icenet.port(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), R(1, 2, 1, 1)).report
    assert any("not compared: the original fails in training mode on 1x2x1x1" in note for note in report.notes)
    assert {check.mode for check in report.checks} == {"evaluation", "training"}


class Longer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if x.size(1) > 4:
            y = y[:, -4:] * 2
        return y.mean(1)


def test_a_branch_on_a_size_limits_the_sizes_of_the_port() -> None:
    port = icenet.port(Longer(), torch.randn(2, 6, 4))
    assert "x has at least 5 in dimension 1" in str(port.report.notes)
    assert port.module(mx.zeros((2, 5, 4))).shape == (2, 4)
    with pytest.raises(ValueError, match="x has 4 in dimension 1; the port was made for at least 5"):
        port.module(mx.zeros((2, 4, 4)))


def test_the_batches_of_two_inputs_are_equal_and_of_any_size() -> None:
    """As of Llama: the original broadcasts a mask of one sentence, the port takes as many masks as sentences."""
    example = ([np.zeros((2, 6)), np.zeros((2, 6))], {})

    def batches(given: Any) -> list[int]:
        return [len(array) for array in given[0]]

    limits = find_limits(
        example,
        [Guard("m >= 2", {"m": ((1, 0),)}), Guard("n >= 2", {"n": ((0, 0),)})],
        runs=lambda given: batches(given)[1] in (1, batches(given)[0]),
        serves=lambda given: batches(given)[0] == batches(given)[1],
    )
    assert not limits.ranges
    assert [guard.places for guard in limits.guards] == [{"size": ((1, 0),), "other": ((0, 0),)}]


class Halves(nn.Module):
    """PyTorch's export fixes the window, and says so in a guard only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, (x.shape[2] // 2, x.shape[3] // 2))


class HalfWindows(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unfold(3, x.shape[3] // 2, 1)


class Steps(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(x.shape[2] // 4):
            x = x * 2
        return x


class Even(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[2] % 2 == 0 else x


class Wide(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(2) if x.shape[3] > x.shape[2] else x.mean(3)


@pytest.mark.parametrize(
    ("module", "right", "wrong", "message"),
    [
        (Halves(), (9, 11), (12, 10), "x has 12 in dimension 2; the port was made for 8 to 9"),
        (HalfWindows(), (15, 11), (8, 20), "x has 20 in dimension 3; the port was made for 10 to 11"),
        (Steps(), (11, 20), (12, 10), "x has 12 in dimension 2; the port was made for 8 to 11"),
        (Even(), (2, 3), (7, 10), "x has 7 in dimension 2; the port was made for x.shape[2] % 2 == 0"),
        (Wide(), (2, 3), (3, 3), "the port was made for x.shape[3] > x.shape[2]"),
    ],
)
def test_sizes_that_an_export_decides_with_limit_the_port(
    module: nn.Module, right: tuple[int, int], wrong: tuple[int, int], message: str
) -> None:
    port = icenet.port(module, R(2, 3, 8, 10))
    assert len([note for note in port.report.notes if "computes something else" in note]) == 1
    assert "if not x" not in port.source and max(map(len, port.source.splitlines())) <= 110
    x = torch.randn(3, 5, *right)
    np.testing.assert_allclose(port.module(mx.array(x.numpy())), module(x), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=re.escape(message)):
        port.module(mx.zeros((2, 3, *wrong)))
