"""The judge itself, traces, reports, and whether a broken layer is named; against facts known beforehand."""

from __future__ import annotations

import copy
import io
import json
import math
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from icenet.core.config import Config
from icenet.core.errors import WeightsError
from icenet.parity.run import Engines, build, judge_engines, random_batch
from icenet.parity.trace import Trace
from icenet.parity.yardstick import FACTOR, half_ulp, judge, judge_curve, rms, round_to

# ---- the yardstick ------------------------------------------------------------------------------------------


def noisy(seed: int, scale: float, shape: tuple[int, ...] = (64, 32)) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    reference = generator.standard_normal(shape)
    return reference, reference + scale * generator.standard_normal(shape)


def test_equal_noise_passes_and_ten_times_it_does_not() -> None:
    reference, torch = noisy(0, 1e-6)
    _, mlx = noisy(0, 7e-6)
    assert judge(mlx, torch, reference).ratio == pytest.approx(7, rel=0.3)
    assert judge(mlx, torch, reference).passed
    assert not judge(reference + 10 * (torch - reference), torch, reference).passed


@pytest.mark.parametrize("factor", [FACTOR * 0.99, FACTOR * 1.01])
def test_the_line_is_drawn_at_factor(factor: float) -> None:
    reference, torch = noisy(1, 1e-4)
    assert judge(reference + factor * (torch - reference), torch, reference).passed is (factor < FACTOR)


def test_one_wrong_element_in_a_million_is_seen() -> None:
    reference, torch = noisy(2, 1e-6, (1000, 1000))
    mlx = torch.copy()
    mlx[3, 4] += 1e-4
    judgement = judge(mlx, torch, reference)
    assert judgement.rms_ratio < FACTOR < judgement.peak_ratio and not judgement.passed


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("fp32", np.float32), ("fp16", np.float16), ("fp64", np.float64)])
def test_half_ulp_is_numpys_spacing(dtype: str, numpy_dtype: Any) -> None:
    values = np.concatenate([np.random.default_rng(0).standard_normal(1000) * 100, [1, 2, 0.5, 1000, 1e-3, 0, 1e-7]])
    values = values.astype(numpy_dtype)
    expected = np.spacing(np.abs(values)).astype(np.float64) / 2
    np.testing.assert_array_equal(half_ulp(values.astype(np.float64), dtype), expected)


def test_half_ulp_of_zero_is_next_to_nothing() -> None:
    """A frexp of zero has exponent 0: taken as it is, every sparse tensor would get the noise of 1."""
    assert half_ulp(0.0, "fp32") == 2.0**-150
    reference = np.zeros(100)
    reference[0] = 1e-9
    assert not judge(reference + 1e-11, reference, reference).passed


def test_a_correctly_rounded_result_passes_beside_an_exact_one() -> None:
    reference = np.random.default_rng(3).standard_normal(500)
    assert judge(reference.astype(np.float32), reference, reference).passed
    assert not judge(reference * (1 + 2.0**-19), reference, reference).passed
    assert judge(round_to(reference, "bf16"), reference, reference, "bf16").passed
    assert not judge(round_to(reference, "bf16"), reference, reference, "fp32").passed


def test_a_gradient_that_cancels_to_zero_is_judged_by_its_terms() -> None:
    """The sum of n terms that cancel: in fp32 the rounding of the terms is left, in whatever order they are added."""
    terms = np.random.default_rng(4).standard_normal((4096, 48))
    terms -= terms.mean(axis=0)
    exact = terms.sum(axis=0)
    mlx = terms.astype(np.float32).reshape(64, 64, 48).sum(axis=0).sum(axis=0) / np.float32(64)
    assert rms(exact) < 1e-12
    beside = 1.0  # RMS of sums of 4096 such terms times inputs of order 1, over 64
    assert judge(mlx, np.zeros(48), exact / 64, beside=beside).passed
    assert judge(mlx, np.zeros(48), exact / 64).ratio > 1e6
    # the floor is for zeros: a small gradient that is not zero keeps its own noise
    small = np.full(48, 1e-6)
    assert not judge(small * (1 + 1e-4), small, small, beside=beside).passed


def test_values_below_the_least_normal_number_may_be_flushed() -> None:
    tiny = np.full(8, 1e-41)
    assert judge(np.zeros(8), tiny, tiny).passed
    assert not judge(np.zeros(8), tiny * 1e6, tiny * 1e6).passed


def test_not_finite() -> None:
    reference, torch = noisy(5, 1e-6)
    broken = torch.copy()
    broken[0, 0] = np.nan
    assert not judge(broken, torch, reference).passed
    assert "1 values" in judge(broken, torch, reference).note
    assert not judge(torch, broken, reference).passed
    both = torch.copy()
    both[0, 0] = reference[0, 0] = -np.inf
    assert judge(both, both, reference).passed
    opposite = both.copy()
    opposite[0, 0] = np.inf
    assert not judge(opposite, both, reference).passed


def test_another_shape_fails_with_a_word() -> None:
    assert "shape [2, 3]" in judge(np.ones((2, 3)), np.ones(6), np.ones(6)).note
    assert not judge(np.ones((2, 3)), np.ones(6), np.ones(6)).passed


def test_bf16_rounds_to_nearest_even() -> None:
    def bits(word: int) -> float:
        return struct.unpack("<f", struct.pack("<I", word))[0]

    cases = {0x3F800000: 0x3F800000, 0x3F807FFF: 0x3F800000, 0x3F808000: 0x3F800000, 0x3F818000: 0x3F820000}
    for given, expected in cases.items():
        assert round_to(np.float32(bits(given)), "bf16") == np.float32(bits(expected))
    assert np.isnan(round_to(np.float32("nan"), "bf16")) and round_to(np.float32("inf"), "bf16") == np.inf


def test_curves() -> None:
    steps = np.arange(50)
    truth = 5 - 0.05 * steps
    noise = 1e-6 * (1 + steps) * np.where(steps % 7 == 6, 0.0, 1.0)  # crosses the truth every seventh step
    torch32 = truth + noise
    judged = judge_curve(torch32 + 7 * np.maximum.accumulate(noise), torch32, truth)
    assert judged.passed and judged.worst == pytest.approx(7, rel=1e-3)
    assert judged.strict > FACTOR and judged.strict_step % 7 == 6
    late = torch32.copy()
    late[30] += 9 * 1e-6 * 31
    judged = judge_curve(late, torch32, truth)
    assert not judged.passed and judged.worst_step == 30
    # the running maximum looks back only: noise to come excuses nothing now
    early = torch32.copy()
    early[2] += 1e-4
    assert judge_curve(early, torch32, truth).worst_step == 2
    assert not judge_curve(early, torch32, truth).passed


def test_curves_at_the_floor_and_at_the_edge() -> None:
    exact = np.full(3, 2.5)
    assert judge_curve(exact + 2.0**-22, exact, exact).worst == 2  # an ulp is two halves
    assert judge_curve([1.0, math.nan], [1.0, 1.0], [1.0, 1.0]).worst == math.inf
    assert judge_curve([1.0, math.nan], [1.0, math.nan], [1.0, 1.0]).worst_step == 1
    with pytest.raises(ValueError, match="cannot be compared"):
        judge_curve([1.0], [1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="cannot be compared"):
        judge_curve([], [], [])


# ---- probes and traces --------------------------------------------------------------------------------------


def small(**model: Any) -> Config:
    options = {"hidden_size": 48, "num_layers": 2, "num_heads": 3, "vocab_size": 61, "max_seq_length": 32}
    return Config.from_dict({"model": {"type": "transformer", "dropout": 0.1, **options, **model}})


@pytest.fixture(scope="module")
def engines() -> Engines:
    return build(small(), device_mlx="cpu")


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    return random_batch(small(), rows=2, length=24)


def test_both_probes_name_the_same_modules_in_the_same_order(engines: Engines, batch: Any) -> None:
    import icenet.tools.probe
    import icenet_torch.tools.probe

    ours = icenet.tools.probe.record(engines.mlx, batch, train=True, gradients=True)
    theirs = icenet_torch.tools.probe.record(engines.torch, batch, train=True, gradients=True)
    assert list(ours.values) == list(theirs.values) and list(ours.calls) == list(theirs.calls)
    assert {n: v.dtype for n, v in ours.values.items()} == {n: v.dtype for n, v in theirs.values.items()}
    named = {path for path, _ in engines.torch.model.named_modules()}
    assert set(theirs.of("module")) == named - {"blocks"}  # the list itself is not called
    assert ours.logits.shape == (2, 24, 61)
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)


def test_recording_leaves_no_trace_in_the_model(engines: Engines, batch: Any) -> None:
    import icenet.tools.probe

    model = engines.mlx.model
    before = [(path, type(module)) for path, module in model.named_modules()]
    outputs = engines.mlx.forward(batch)
    trace = icenet.tools.probe.record(engines.mlx, batch)
    np.testing.assert_array_equal(trace.logits, outputs)
    assert [(path, type(module)) for path, module in model.named_modules()] == before
    with pytest.raises(RuntimeError, match="on purpose"), icenet.tools.probe.recording(model, Trace()):
        raise RuntimeError("on purpose")
    assert [(path, type(module)) for path, module in model.named_modules()] == before


def test_a_module_called_twice_is_recorded_twice_on_both() -> None:
    import mlx.core as mx
    import mlx.nn
    import torch

    import icenet.tools.probe
    import icenet_torch.tools.probe

    class Twice(mlx.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlx.nn.Linear(3, 3)

        def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
            return self.inner(self.inner(x)), x

    class TwiceTorch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.inner(self.inner(x)), x

    names = ["module:inner", "module:inner#2", "module:", "module:[1]"]
    model = Twice()
    with icenet.tools.probe.recording(model, Trace()) as trace:
        model(mx.ones((2, 3)))
    assert list(trace.values) == names
    np.testing.assert_array_equal(trace.values["module:inner#2"].array, trace.values["module:"].array)
    other = TwiceTorch()
    with icenet_torch.tools.probe.recording(other, Trace()) as trace:
        other(torch.ones(2, 3))
    assert list(trace.values) == names and not other._forward_hooks


def test_replay_on_the_runs_own_inputs_gives_the_runs_outputs(engines: Engines, batch: Any) -> None:
    import icenet.tools.probe
    import icenet_torch.tools.probe

    for engine, probe in ((engines.mlx, icenet.tools.probe), (engines.torch, icenet_torch.tools.probe)):
        trace = probe.record(engine, batch, 3, train=True)
        for path, call in trace.calls.items():
            output = probe.replay(engine, path, call, step=3, train=True)["output"]
            np.testing.assert_array_equal(output.array, trace.values[f"module:{path}"].array, err_msg=path)


def test_replayed_gradients_are_those_of_the_layer_by_hand(engines: Engines, batch: Any) -> None:
    """For y = x W^T + b: dx = g W, dW = g^T x, db = sum of g."""
    import icenet.tools.probe
    import icenet_torch.tools.probe
    from icenet.parity.trace import Value

    path = "blocks.1.feed_forward.up_proj"
    weight = engines.torch.weights()[f"{path}.weight"].astype(np.float64)
    for engine, probe in ((engines.mlx, icenet.tools.probe), (engines.torch, icenet_torch.tools.probe)):
        call = probe.record(engine, batch).calls[path]
        x = call.args[0].array.astype(np.float64)
        g = np.random.default_rng(0).standard_normal((*x.shape[:2], weight.shape[0])).astype(np.float32)
        found = probe.replay(engine, path, call, [Value(g, "fp32")])
        assert list(found) == ["output", "input 0", "gradient weight", "gradient bias"]
        np.testing.assert_allclose(found["input 0"].array, g @ weight, atol=1e-5)
        np.testing.assert_allclose(found["gradient weight"].array, np.einsum("bto,bti->oi", g, x), atol=1e-4)
        np.testing.assert_allclose(found["gradient bias"].array, g.sum((0, 1)), atol=1e-4)


def test_a_trace_survives_the_disk(engines: Engines, batch: Any, tmp_path: Any) -> None:
    import icenet.tools.probe

    padded = {**batch, "attention_mask": np.tri(2, 24, 12, dtype=np.int32)}
    trace = icenet.tools.probe.record(engines.mlx, padded, train=True, gradients=True)
    trace.save(tmp_path / "trace.safetensors")
    read = Trace.load(tmp_path / "trace.safetensors")
    assert list(read.values) == list(trace.values) and list(read.calls) == list(trace.calls)
    assert read.meta == trace.meta and read.meta["framework"] == "MLX"
    for name, value in trace.values.items():
        assert read.values[name].dtype == value.dtype
        np.testing.assert_array_equal(read.values[name].array, value.array)
    path = "blocks.0.attention"
    again = icenet.tools.probe.replay(engines.mlx, path, read.calls[path], train=True)
    np.testing.assert_array_equal(again["output"].array, trace.values[f"module:{path}"].array)
    (tmp_path / "other.safetensors").write_bytes(b"no trace at all")
    with pytest.raises(WeightsError):
        Trace.load(tmp_path / "other.safetensors")


# ---- finding what is broken on purpose ----------------------------------------------------------------------


def broken(engines: Engines, change: Any) -> Engines:
    """The three engines with a copy of the PyTorch one, changed, in the place of the one judged."""
    from icenet_torch.engine.optimizers import new_optimizer

    victim = copy.copy(engines.torch)
    victim.model = copy.deepcopy(engines.torch.model)
    victim._call = victim.model
    victim.parameters = dict(victim.model.named_parameters())
    victim.optimizer = new_optimizer(victim.config.training, victim.model)
    victim._dropouts = victim.model.dropout_layers()
    modules = dict(victim.model.named_modules())
    change(modules)
    return Engines(victim, engines.torch, engines.reference)


def one_weight(modules: Any) -> None:
    modules["blocks.1.feed_forward.up_proj"].weight.data[5, 7] += 1e-3


def layer_norm_eps(modules: Any) -> None:
    modules["blocks.0.feed_forward_norm"].eps = 1e-3


def transposed(modules: Any) -> None:
    weight = modules["blocks.1.attention.q_proj"].weight
    weight.data = weight.data.T.contiguous()


def dropout_mask(modules: Any) -> None:
    modules["blocks.0.feed_forward.dropout"].p = 0.11


def activation(modules: Any) -> None:
    modules["blocks.1.feed_forward"].activation = "gelu_tanh"


def residual(modules: Any) -> None:
    block = modules["blocks.0"]
    forward = block.forward
    block.forward = lambda x, *rest: forward(x, *rest) + 1e-4 * x


def heads(modules: Any) -> None:
    modules["blocks.0.attention"].num_heads = 4


def backward_only(modules: Any) -> None:
    import torch

    class Slightly(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 1.001

    norm = modules["blocks.1.attention_norm"]
    forward = norm.forward
    norm.forward = lambda x: Slightly.apply(forward(x))


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        (one_weight, "blocks.1.feed_forward.up_proj"),
        (layer_norm_eps, "blocks.0.feed_forward_norm"),
        (transposed, "blocks.1.attention.q_proj"),
        (dropout_mask, "blocks.0.feed_forward.dropout"),
        (activation, "blocks.1.feed_forward"),
        (residual, "blocks.0"),
        (heads, "blocks.0.attention"),
        (backward_only, "blocks.1.attention_norm"),
    ],
)
def test_the_report_names_the_broken_layer_and_no_other(
    engines: Engines, batch: Any, change: Any, layer: str
) -> None:
    report = judge_engines(broken(engines, change), batch)
    assert report.differing() == [layer]
    assert not report.passed and f"differs here: {layer} " in report.verdict()
    assert ("forward pass" in report.verdict()) is (change is not backward_only)
    assert bool(report.unequal_weights) is (change in (one_weight, transposed))


def test_an_unbroken_copy_passes_with_a_ratio_of_one(engines: Engines, batch: Any) -> None:
    report = judge_engines(broken(engines, lambda modules: None), batch)
    assert report.passed and report.differing() == []
    assert report.worst is not None and report.worst[1].ratio <= 1


def test_a_wrong_optimizer_is_seen(engines: Engines, batch: Any) -> None:
    altered = broken(engines, lambda modules: None)
    for part in altered.mlx.optimizer.groups:  # type: ignore[attr-defined]
        for group in part.optimizer.param_groups:
            group["betas"] = (0.9, 0.951)
    report = judge_engines(altered, batch)
    failing = [section.title for section in report.sections if not section.passed]
    assert failing == ["optimizer step on equal gradients"]


def test_judging_changes_nothing(engines: Engines, batch: Any) -> None:
    before = [(e.weights(), e.optimizer_state()) for e in engines]
    judge_engines(engines, batch)
    for engine, (weights, state) in zip(engines, before, strict=True):
        for old, new in ((weights, engine.weights()), (state, engine.optimizer_state())):
            assert list(old) == list(new)
            assert all(np.array_equal(old[name], new[name]) for name in old)


def test_report_on_the_screen_and_as_json(engines: Engines, batch: Any) -> None:
    from rich.console import Console

    report = judge_engines(broken(engines, layer_norm_eps), batch)
    text = io.StringIO()
    report.render(Console(file=text, width=120))
    shown = text.getvalue()
    assert "differs here" in shown and "float64" in shown and "TF32 off" in shown
    told = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert told["passed"] is False and told["differing"] == ["blocks.0.feed_forward_norm"]
    assert told["engines"]["reference"]["device"] == "cpu"
    rows = {row["path"]: row for row in told["sections"][0]["rows"]}
    assert rows["blocks.0.feed_forward_norm"]["mark"] == "differs here"
    assert rows["blocks.0"]["mark"] == "contains" and rows["blocks.1"]["mark"] == "inherits"
    long = io.StringIO()
    report.render(Console(file=long, width=120), verbose=True)
    assert len(long.getvalue().splitlines()) > len(shown.splitlines())


def test_parity_imports_no_framework() -> None:
    code = (
        "import sys, icenet.parity.run, icenet.parity.report; "
        "print([name for name in ('mlx', 'torch') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
