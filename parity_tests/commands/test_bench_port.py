"""`icenet bench port`: what it times, and what it says of missing packages."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from icenet.commands.bench import port
from icenet.core.errors import IceNetError, UsageError
from icenet.tools import ports
from icenet_torch.porting import sources

TASK = {"device": "cpu", "batch": 2, "length": 6, "layers": 1, "precision": "fp32"}


@pytest.fixture(autouse=True)
def same_device() -> Iterator[None]:
    device = mx.default_device()
    yield
    mx.set_default_device(device)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes GPT-2 small."""
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    monkeypatch.setattr(transformers, "GPT2Config", functools.partial(transformers.GPT2Config, **sizes))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_port_is_timed_next_to_the_own_model(
    small: None, precision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # without what is compiled, which takes seconds
    monkeypatch.setattr(port, "WORK", {work: how for work, how in port.WORK.items() if not how[1]})
    session = port.Session({**TASK, "model": "gpt2", "precision": precision})
    found = session.machine() | {work: session.time(work, 1) for work in port.WORK}
    for work in port.WORK:
        assert found[work]["own_ms"] > 0 and found[work]["port_ms"] > 0 and found[work]["ratio"]["median"] > 0
    port.PortReport([found]).render()
    output = capsys.readouterr().out
    assert f"gpt2, 2 x 6, {precision}" in output and "ported and proved in" in output


def test_models_with_other_logits_are_not_compared(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "calls", lambda module: lambda x: module(x, use_cache=False)["logits"] * 1.1)
    with pytest.raises(IceNetError, match="other logits"):
        port.Session({**TASK, "model": "gpt2"})


@pytest.mark.parametrize("compiled", [False, True])
def test_a_side_computes_the_forward_pass_and_trains(compiled: bool) -> None:
    mx.random.seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    x, labels = np.random.default_rng(0).standard_normal((5, 4), np.float32), np.array([0, 1, 2, 0, 1], np.int32)
    side = ports.Side(module, module, x, labels, "fp32")
    before = side.logits()
    side.forward(compiled)()
    np.testing.assert_array_equal(side.logits(), before)  # dropout is off
    step = side.step(compiled)
    for _ in range(3):
        step()
    assert module.training and not np.array_equal(side.logits(), before)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(UsageError, match="pip install no_such_package"):
        sources.package("no_such_package.models")
