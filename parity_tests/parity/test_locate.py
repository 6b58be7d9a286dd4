"""Planted faults: the report must name the layer that has the fault, and no other."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import is_one_line, same_bits
from parity_config import transformer_config
from planted import FAULTS
from rich.console import Console

from icenet.core import backends, rng
from icenet.parity import align, fp16
from icenet.parity.configuration import locate
from icenet.parity.configuration.engines import Engines, build
from icenet.parity.configuration.report import Report, _interesting
from icenet.parity.configuration.run import compare_engines, optimizer_rows
from icenet.parity.trace import Call, Value, short_dtype
from icenet.parity.yardstick import Judgement

Modules = dict[str, Any]


@pytest.fixture(scope="module")
def without_dropout() -> Engines:
    """Returns engines that are compared in half the time: training and evaluation are the same."""
    return build(transformer_config())


def with_fault(engines: Engines, plant: Callable[[Modules], None]) -> Engines:
    """Returns the engines with another PyTorch engine, changed by `plant`, in place of MLX."""
    faulty = backends.engine(engines.torch.config, "torch", "cpu")
    plant(dict(faulty.model.named_modules()))
    return Engines(faulty, engines.torch, engines.reference)


def no_fault(modules: Modules) -> None:
    pass


def one_weight(modules: Modules) -> None:
    modules["blocks.1.feed_forward.up_proj"].weight.data[5, 7] += 1e-3


def layer_norm_eps(modules: Modules) -> None:
    modules["blocks.0.feed_forward_norm"].eps = 1e-3


def transposed_weight(modules: Modules) -> None:
    weight = modules["blocks.1.attention.q_proj"].weight
    weight.data = weight.data.T.contiguous()


def dropout_probability(modules: Modules) -> None:
    modules["blocks.0.feed_forward.dropout"].p = 0.11


def activation(modules: Modules) -> None:
    modules["blocks.1.feed_forward"].activation = "gelu_tanh"


def residual(modules: Modules) -> None:
    block = modules["blocks.0"]
    forward = block.forward
    block.forward = lambda x, *rest: forward(x, *rest) + 1e-4 * x


def num_heads(modules: Modules) -> None:
    attention = modules["blocks.0.attention"]
    attention.plan = attention.plan._replace(head_size=attention.plan.head_size // 2)


def backward_only(modules: Modules) -> None:
    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 1.001

    norm = modules["blocks.1.attention_norm"]
    forward = norm.forward
    norm.forward = lambda x: WrongGradient.apply(forward(x))


@pytest.mark.usefixtures("few_samples")
@pytest.mark.parametrize(
    ("fault", "layer"),
    [
        (one_weight, "blocks.1.feed_forward.up_proj"),
        (layer_norm_eps, "blocks.0.feed_forward_norm"),
        pytest.param(transposed_weight, "blocks.1.attention.q_proj", marks=pytest.mark.slow),
        (dropout_probability, "blocks.0.feed_forward.dropout"),
        (activation, "blocks.1.feed_forward"),
        (residual, "blocks.0"),
        pytest.param(num_heads, "blocks.0.attention", marks=pytest.mark.slow),
        (backward_only, "blocks.1.attention_norm"),
    ],
)
def test_the_report_names_the_faulty_layer_and_no_other(
    engines: Engines, without_dropout: Engines, batch: Any, fault: Callable[[Modules], None], layer: str
) -> None:
    used = engines if fault is dropout_probability else without_dropout
    report = compare_engines(with_fault(used, fault), batch)
    assert report.differing() == [layer]
    assert not report.passed and is_one_line(report.verdict(), f"differs here: {layer} ")
    assert ("forward pass" in report.verdict()) is (fault is not backward_only)
    assert bool(report.unequal_weights) is (fault in (one_weight, transposed_weight))


def test_an_equal_engine_passes_with_a_ratio_of_at_most_one(engines: Engines, batch: Any) -> None:
    report = compare_engines(with_fault(engines, no_fault), batch)
    assert report.passed and report.differing() == []
    assert report.worst is not None and report.worst[1].ratio <= 1


@pytest.mark.usefixtures("few_samples")
def test_a_wrong_optimizer_is_found(without_dropout: Engines, batch: Any) -> None:
    altered = with_fault(without_dropout, no_fault)
    for part in altered.mlx.optimizer.groups:  # type: ignore[attr-defined]
        for group in part.optimizer.param_groups:
            group["betas"] = (0.9, 0.951)
    report = compare_engines(altered, batch)
    failing = [section.title for section in report.sections if not section.passed]
    assert failing == ["training step on equal gradients"]


def test_an_error_of_an_update_is_found_at_any_learning_rate(
    without_dropout: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 3e-4, weight decay after the step changes a parameter by less than its rounding."""
    training = without_dropout.torch.config.training
    assert training.learning_rate == 3e-4 and training.optimizer == "adamw"  # with its default decay
    gradients = {path: rng.normal(rng.key(0, path), a.shape) for path, a in without_dropout.torch.weights().items()}
    assert all(row.passed for row in optimizer_rows(without_dropout, [gradients]))
    fault = next(fault for fault in FAULTS if fault.name == "AdamW: weight decay after the step")
    fault.plant(monkeypatch, without_dropout.mlx)
    failed = {(row.kind, row.path) for row in optimizer_rows(without_dropout, [gradients]) if not row.passed}
    assert ("parameter", "blocks.0.attention.q_proj.weight") in failed
    assert {kind for kind, _ in failed} == {"parameter"}


@pytest.mark.usefixtures("few_samples")
def test_a_comparison_leaves_the_engines_unchanged(engines: Engines, batch: Any) -> None:
    """Also one that samples the noise of a layer and of all values."""
    for used in (engines, with_fault(engines, layer_norm_eps)):
        before = [(engine.weights(), engine.optimizer_state()) for engine in used]
        compare_engines(used, batch)
        for engine, (weights, state) in zip(used, before, strict=True):
            assert same_bits(engine.weights(), weights) and same_bits(engine.optimizer_state(), state)


# ---- the report ---------------------------------------------------------------------------------------------


def printed(report: Report, **options: Any) -> str:
    text = io.StringIO()
    report.render(Console(file=text, width=120), **options)
    return text.getvalue()


@pytest.mark.usefixtures("few_samples")
def test_the_report_as_text_and_as_json(without_dropout: Engines, batch: Any) -> None:
    report = compare_engines(with_fault(without_dropout, layer_norm_eps), batch)
    text = printed(report)
    assert "differs here" in text and "float64" in text and "TF32 off" in text
    assert len(printed(report, verbose=True).splitlines()) > len(text.splitlines())

    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert plain["passed"] is False and plain["differing"] == ["blocks.0.feed_forward_norm"]
    assert plain["engines"]["reference"]["device"] == "cpu"
    marks = {row["path"]: row["mark"] for row in plain["sections"][0]["rows"]}
    assert marks["blocks.0.feed_forward_norm"] == "differs here"
    assert marks["blocks.0"] == "contains" and marks["blocks.1"] == "propagated"


def test_a_section_that_passes_shows_its_worst_rows_and_those_with_a_remark() -> None:
    rows = [locate.Row("module", f"layer{n}", (1,), Judgement(n, 1, n, n)) for n in range(8)]
    rows[0] = replace(rows[0], ties="ties")
    shown = [row.path for row in _interesting(rows)]
    assert shown == ["layer0", "layer5", "layer6", "layer7"]


def test_cotangents_are_scaled_until_no_gradient_overflows_in_fp16() -> None:
    def replay(path: str, call: Call, cotangents: list[Value], dtype: Any = np.float64) -> dict[str, Value]:
        with np.errstate(over="ignore"):
            gradient = (cotangents[0].array.astype(np.float64) * 1e6).astype(dtype)
        return {"output": cotangents[0], "input 0": Value(gradient, short_dtype(gradient.dtype))}

    def wrong(path: str, call: Call, cotangents: list[Value]) -> dict[str, Value]:
        return {"input 0": Value(np.full(3, np.nan), "fp16")}

    half = partial(replay, dtype=np.float16)
    large, small = ([Value(np.full(3, value, np.float16), "fp16")] for value in (1, 2.0**-10))
    for mlx, given, scale in [(half, large, 2.0**-10), (half, small, 2.0**-10), (wrong, large, 2.0**-20)]:
        (found,) = fp16.scaled_for_fp16("", Call(()), given, (mlx, half, replay))
        assert found.dtype == "fp16" and found.array.tolist() == [scale] * 3


def test_the_order_of_axes_of_length_one_is_no_transposition() -> None:
    """Values that nearly agree are not said to be equal in another order if that order is the same."""
    theirs = np.linspace(1, 2, 12)
    close = theirs * (1 + 1e-6)
    assert align.permutation(close.reshape(1, 1, 12), theirs.reshape(1, 1, 12)) == ""
    assert align.permutation(close.reshape(3, 1, 4), theirs.reshape(3, 1, 4)) == ""
    assert "transpose(1, 0, 2)" in align.permutation(theirs.reshape(3, 1, 4), theirs.reshape(1, 3, 4))
    assert "transpose(0, 2, 1)" in align.permutation(theirs.reshape(1, 3, 4).swapaxes(1, 2), theirs.reshape(1, 3, 4))
    square = theirs[:9].reshape(1, 3, 3)
    assert "transpose(0, 2, 1)" in align.permutation(square.swapaxes(1, 2), square)
