"""The passes of a training step as a CUDA graph: when a graph is made, and that it changes no bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY_MODELS

from icenet.core.config import Config
from icenet.core.engine import MicroBatch
from icenet_torch.engine import capture
from icenet_torch.engine.engine import Engine


class FakeGraph:
    """Counts the graphs and their replays."""

    made = 0
    replays = 0

    def __init__(self, *arguments: Any) -> None:
        FakeGraph.made += 1

    def replay(self, *arguments: Any) -> torch.Tensor:
        FakeGraph.replays += 1
        return torch.zeros(())


def parts(*shape: int) -> list[MicroBatch]:
    return [MicroBatch({"inputs": torch.zeros(shape)}, None, 1.0, True)]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[..., Any], list[Any]]:
    monkeypatch.setattr(capture, "_Graph", FakeGraph)
    monkeypatch.setattr(FakeGraph, "made", 0)
    monkeypatch.setattr(FakeGraph, "replays", 0)
    calls: list[Any] = []
    model = torch.nn.Linear(2, 2)

    def run(given: Any, factors: Any) -> torch.Tensor:
        calls.append(given)
        return torch.zeros(())

    captured = capture.CapturedPasses(run, model)
    return lambda *shape: captured(parts(*shape), torch.ones(1, 2)), [calls, model, captured]


def test_a_shape_is_captured_after_the_first_steps(passes: Any) -> None:
    call, (calls, *_) = passes
    for _ in range(capture.EAGER_STEPS + 3):
        call(2, 3)
    assert (len(calls), FakeGraph.made, FakeGraph.replays) == (capture.EAGER_STEPS, 1, 3)
    call(2, 4)
    assert (len(calls), FakeGraph.made) == (capture.EAGER_STEPS + 1, 1)


def test_the_number_of_graphs_is_limited(passes: Any) -> None:
    call, _ = passes
    for size in range(capture.MAX_GRAPHS + 3):
        for _ in range(capture.EAGER_STEPS + 2):
            call(size)
    assert FakeGraph.made == capture.MAX_GRAPHS


def test_hooks_are_called(passes: Any) -> None:
    call, (calls, model, _) = passes
    handle = model.register_forward_hook(lambda *arguments: None)
    for _ in range(capture.EAGER_STEPS + 3):
        call(2)
    assert len(calls) == capture.EAGER_STEPS + 3 and not FakeGraph.made
    handle.remove()
    call(2)
    assert FakeGraph.made == 1


def test_a_graph_without_memory_is_not_tried_again(passes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call, (calls, *_) = passes
    tried = []

    def fail(*arguments: Any) -> None:
        tried.append(arguments)
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(capture, "_Graph", fail)
    for _ in range(capture.EAGER_STEPS + 4):
        call(2)
    assert len(tried) == 1 and len(calls) == capture.EAGER_STEPS + 4


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", ["transformer", "cnn", "lstm"])
def test_a_graph_gives_the_bits_of_the_passes(family: str, precision: str) -> None:
    """With dropout, micro-batches and clipping, over several steps with other batches."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    drawn = np.random.default_rng(0)
    ids = drawn.integers(0, 200, (6, 4, 17)).astype(np.int32)
    images = drawn.standard_normal((6, 4, 16, 16, 1)).astype(np.float32)
    batches = [
        {"inputs": images[step], "labels": ids[step, :, 0] % 10}
        if family == "cnn"
        else {"inputs": ids[step, :, :-1].copy(), "labels": ids[step, :, 1:].copy()}
        for step in range(6)
    ]
    overrides = [f"training.mixed_precision={precision}", "training.gradient_accumulation=2", "device=cuda"]
    overrides += ["backend=torch", "training.batch_size=4"]
    results = []
    for is_captured in (False, True):
        engine = Engine(Config.from_dict({"model": TINY_MODELS[family]}, overrides))
        if not is_captured:
            engine._captured = None
        steps = [engine.read(engine.train_step(batch, index, 1e-3)) for index, batch in enumerate(batches)]
        assert not is_captured or engine._captured._graphs  # type: ignore[union-attr]
        results.append((steps, engine.model.weights()))
    (plain, weights), (captured, own) = results
    assert plain == captured
    assert all(np.array_equal(weights[path], own[path]) for path in weights)
