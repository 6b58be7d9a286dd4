"""Recording, replaying and storing what a model computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch
from helpers import native, python

from icenet.core import backends
from icenet.core.errors import WeightsError
from icenet.parity.configuration.engines import Engines, record, replay
from icenet.parity.trace import Trace, Value


def probe(backend: str) -> Any:
    return backends.module(backend, "tools.probe")


# ---- any module ---------------------------------------------------------------------------------------------


class MLXModel(mlx.nn.Module):
    """Calls a layer twice and returns two arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlx.nn.Linear(3, 3)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        return self.inner(self.inner(x)), x


class TorchModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner(self.inner(x)), x


@dataclass
class Output:
    first: Any
    second: Any


class MLXDataclass(MLXModel):
    def __call__(self, x: mx.array) -> Any:
        return Output(*super().__call__(x))


class TorchDataclass(TorchModel):
    def forward(self, x: torch.Tensor) -> Any:
        return Output(*super().forward(x))


@pytest.mark.parametrize(("backend", "model_class"), [("mlx", MLXDataclass), ("torch", TorchDataclass)])
def test_the_arrays_of_a_dataclass_are_recorded(backend: str, model_class: Callable[[], Any]) -> None:
    with probe(backend).recording(model := model_class(), Trace()) as trace:
        model(native(backend, np.ones((2, 3), np.float32)))
    assert list(trace.values) == ["module:inner", "module:inner#2", "module:", "module:[1]"]


on_any_module = pytest.mark.parametrize(("backend", "model_class"), [("mlx", MLXModel), ("torch", TorchModel)])


@on_any_module
def test_a_trace_names_repeated_calls_and_several_outputs(backend: str, model_class: Callable[[], Any]) -> None:
    model = model_class()
    with probe(backend).recording(model, Trace()) as trace:
        model(native(backend, np.ones((2, 3), np.float32)))
    assert list(trace.values) == ["module:inner", "module:inner#2", "module:", "module:[1]"]
    np.testing.assert_array_equal(trace.values["module:inner#2"].array, trace.values["module:"].array)
    calls = len(trace.values)
    model(native(backend, np.ones((2, 3), np.float32)))
    assert len(trace.values) == calls  # nothing is recorded once the context is closed


@on_any_module
def test_any_module_can_be_replayed(backend: str, model_class: Callable[[], Any]) -> None:
    model = model_class()
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    with probe(backend).recording(model, Trace()) as trace:
        model(native(backend, x))
    cotangent = Value(np.ones((2, 3), np.float32), "fp32")
    found = probe(backend).replay(model, "inner", trace.calls["inner"], [cotangent])
    assert list(found) == ["output", "input 0", "gradient weight", "gradient bias"]
    np.testing.assert_array_equal(found["output"].array, trace.values["module:inner"].array)
    np.testing.assert_allclose(found["gradient weight"].array, np.ones((3, 1)) * x.sum(0), rtol=1e-6)
    np.testing.assert_array_equal(found["gradient bias"].array, [2, 2, 2])


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_gradients_of_convolutions_have_pytorchs_layout(backend: str) -> None:
    layer = mlx.nn.Conv2d(2, 5, 3) if backend == "mlx" else torch.nn.Conv2d(2, 5, 3)
    images = np.arange(2 * 6 * 7 * 2, dtype=np.float32).reshape(2, 6, 7, 2)
    with probe(backend).recording(layer, Trace()) as trace:
        layer(native(backend, images, images=True))
    assert trace.logits.shape == ((2, 4, 5, 5) if backend == "mlx" else (2, 5, 4, 5))
    recorded = trace.calls[""].args[0].array
    np.testing.assert_array_equal(recorded, images if backend == "mlx" else images.transpose(0, 3, 1, 2))
    found = probe(backend).replay(layer, "", trace.calls[""], [Value(np.ones_like(trace.logits), "fp32")])
    assert found["input 0"].array.shape == recorded.shape
    assert found["gradient weight"].array.shape == (5, 2, 3, 3)


def test_the_probes_work_without_an_engine() -> None:
    packages = "('icenet.engine', 'icenet_torch.engine')"
    program = f"""
    import sys, icenet.tools.probe, icenet_torch.tools.probe
    print(sorted(name for name in sys.modules if name.startswith({packages}) and name.endswith('.engine')))
    """
    assert python(program).splitlines()[-1] == "[]"


# ---- our engines --------------------------------------------------------------------------------------------


def test_both_backends_record_the_same_names_in_the_same_order(engines: Engines, batch: Any) -> None:
    ours = record(engines.mlx, batch, train=True, gradients=True)
    theirs = record(engines.torch, batch, train=True, gradients=True)
    assert list(ours.values) == list(theirs.values) and list(ours.calls) == list(theirs.calls)
    assert {n: v.dtype for n, v in ours.values.items()} == {n: v.dtype for n, v in theirs.values.items()}
    paths = {path for path, _ in engines.torch.model.named_modules()}
    assert set(theirs.of("module")) == paths - {"blocks"}  # the list of blocks is not called
    assert ours.logits.shape == (*batch["inputs"].shape, engines.mlx.config.model.vocab_size)
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)


def test_recording_leaves_the_model_unchanged(engines: Engines, batch: Any) -> None:
    model = engines.mlx.model
    before = [(path, type(module)) for path, module in model.named_modules()]
    trace = record(engines.mlx, batch)
    np.testing.assert_array_equal(trace.logits, engines.mlx.forward(batch))
    assert [(path, type(module)) for path, module in model.named_modules()] == before
    with pytest.raises(RuntimeError, match="on purpose"), probe("mlx").recording(model, Trace()):
        raise RuntimeError("on purpose")
    assert [(path, type(module)) for path, module in model.named_modules()] == before


def test_a_replay_of_recorded_inputs_returns_the_recorded_outputs(engines: Engines, batch: Any) -> None:
    for engine in engines[:2]:
        trace = record(engine, batch, 3, train=True)
        for path, call in trace.calls.items():
            output = replay(engine, path, call, step=3, train=True)["output"]
            np.testing.assert_array_equal(output.array, trace.values[f"module:{path}"].array, err_msg=path)


def test_replayed_gradients_of_a_linear_layer(engines: Engines, batch: Any) -> None:
    """For y = x W^T + b and a cotangent g: dx = g W, dW = g^T x, db = sum of g."""
    path = "blocks.1.feed_forward.up_proj"
    weight = engines.torch.weights()[f"{path}.weight"].astype(np.float64)
    for engine in engines[:2]:
        call = record(engine, batch).calls[path]
        x = call.args[0].array.astype(np.float64)
        g = np.random.default_rng(0).standard_normal((*x.shape[:2], weight.shape[0])).astype(np.float32)
        found = replay(engine, path, call, [Value(g, "fp32")])
        assert list(found) == ["output", "input 0", "gradient weight", "gradient bias"]
        np.testing.assert_allclose(found["input 0"].array, g @ weight, atol=1e-5)
        np.testing.assert_allclose(found["gradient weight"].array, np.einsum("bto,bti->oi", g, x), atol=1e-4)
        np.testing.assert_allclose(found["gradient bias"].array, g.sum((0, 1)), atol=1e-4)


def test_a_trace_can_be_saved_and_loaded(engines: Engines, batch: Any, tmp_path: Path) -> None:
    padded = {**batch, "attention_mask": np.tri(2, 24, 12, dtype=np.int32)}
    trace = record(engines.mlx, padded, train=True, gradients=True)
    trace.save(tmp_path / "trace.safetensors")
    loaded = Trace.load(tmp_path / "trace.safetensors")
    assert list(loaded.values) == list(trace.values) and list(loaded.calls) == list(trace.calls)
    assert loaded.meta == trace.meta and loaded.meta["framework"] == "MLX"
    for name, value in trace.values.items():
        assert loaded.values[name].dtype == value.dtype
        np.testing.assert_array_equal(loaded.values[name].array, value.array)
    path = "blocks.0.attention"
    replayed = replay(engines.mlx, path, loaded.calls[path], train=True)
    np.testing.assert_array_equal(replayed["output"].array, trace.values[f"module:{path}"].array)
    (tmp_path / "other.safetensors").write_bytes(b"not a trace")
    with pytest.raises(WeightsError):
        Trace.load(tmp_path / "other.safetensors")
