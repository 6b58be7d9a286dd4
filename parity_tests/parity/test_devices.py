"""A kernel that is wrong on one device only is named: MLX's own, as in the gradient of layer norms on CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import icenet.blas

# isort: split
import mlx.core as mx
import mlx.nn as M
import numpy as np
import pytest
import torch

import icenet
from icenet.core.errors import PortError
from icenet.parity import compare
from icenet.tools import calls


class Device:
    """A device whose kernel of the layer norm has a wrong gradient."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_wrong = True
        original = mx.fast.layer_norm

        @mx.custom_function
        def faulty(x: Any, weight: Any, bias: Any) -> Any:
            return original(x, weight, bias, 1e-5)

        @faulty.vjp
        def gradient(inputs: Any, cotangent: Any, _: Any) -> Any:
            right = mx.vjp(lambda *arrays: original(*arrays, 1e-5), list(inputs), [cotangent])[1]
            return [1.01 * array for array in right]

        def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
            return faulty(x, weight, bias) if self.is_wrong else original(x, weight, bias, eps)

        @contextlib.contextmanager
        def on_another_device() -> Iterator[bool]:
            self.is_wrong = False
            yield True
            self.is_wrong = True

        monkeypatch.setattr(mx.fast, "layer_norm", layer_norm)
        monkeypatch.setattr(calls, "on_another_device", on_another_device)


def test_a_wrong_kernel_of_the_device_is_the_cause(monkeypatch: pytest.MonkeyPatch, mlx_on_cpu: None) -> None:
    Device(monkeypatch)
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    ours = M.Sequential(M.Linear(6, 6), M.LayerNorm(6), M.Linear(6, 6))
    theirs = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 6))
    report = compare(icenet.from_torch(theirs, ours), theirs, x)
    assert report.culprit == "1" and "a agrees on a CPU: a kernel of MLX" in str(report).splitlines()[0]


def test_the_error_of_a_port_says_that_it_agrees_on_a_cpu(monkeypatch: pytest.MonkeyPatch, mlx_on_cpu: None) -> None:
    Device(monkeypatch)
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.LayerNorm(6))
    with pytest.raises(PortError, match="on a CPU it agrees, so a kernel of MLX is wrong on this device"):
        icenet.port(module, torch.randn(5, 6))


def test_the_device_is_restored() -> None:
    before = mx.default_device()
    with calls.on_another_device() as moved:
        assert mx.default_device() == mx.Device(mx.cpu) and moved == (before != mx.Device(mx.cpu))
    assert mx.default_device() == before
