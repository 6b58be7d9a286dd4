"""`icenet bench`: the measured values against counts by hand or by other means, on small models."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, TINY, both_backends, error_line, is_one_line, python, tiny, token_ids

from icenet.cli import bench as cli_bench
from icenet.cli import main as cli
from icenet.commands import isolated
from icenet.commands.bench import common, inference, inference_rows, limits, memory, sides, step, target
from icenet.core import backends, rng
from icenet.core.config import Config
from icenet.core.data.datasets import dataset_for
from icenet.core.errors import IceNetError


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Returns the config of a model with more activations than weights: a small width, many layers and tokens."""
    sizes = ("model.num_layers=12", "model.max_seq_length=64", "training.batch_size=16", "model.dropout=0")
    return tiny(tmp_path_factory.mktemp("deep"), *sizes)


@pytest.fixture(scope="module")
def measured(deep: Config) -> Callable[[str, bool], dict[str, Any]]:
    """Returns a function that measures its memory on a backend, with or without checkpointing, once each."""

    @functools.cache
    def measure(backend: str, checkpointing: bool) -> dict[str, Any]:
        config = common.json_config(
            deep.with_overrides(f"training.gradient_checkpointing={str(checkpointing).lower()}")
        )
        task = {"config": config, "backend": backend, "device": "cpu"}
        return common.measure_isolated("memory", task, memory._GLIBC)

    return measure


# ---- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["mlx", pytest.param("torch", marks=pytest.mark.slow)])
def test_checkpointing_halves_the_peak_of_a_deep_model(deep: Config, measured: Any, backend: str) -> None:
    without, saving = measured(backend, False), measured(backend, True)
    size = 4 * backends.engine(deep, backend).model.num_params
    for found in (without, saving):
        assert (found["weights"], found["gradients"], found["optimizer"]) == (size, size, 2 * size)
        assert found["peak"] >= found["weights"] + found["optimizer"] + found["activations"]
    assert saving["peak"] <= 0.5 * without["peak"]


@pytest.mark.slow
def test_the_peak_of_pytorch_is_the_memory_that_autograd_saves(deep: Config, measured: Any) -> None:
    """Compares it with the bytes of the tensors that the forward pass saves for the backward pass."""
    torch = pytest.importorskip("torch")
    engine = backends.engine(deep, "torch")
    own = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = dataset_for(deep).train_batch(0, deep.training.batch_size)
    engine.model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        arrays = engine.to_device(batch)
        loss = engine._mean_loss(engine._outputs(arrays), arrays)
    assert loss.requires_grad
    found = measured("torch", False)
    assert found["activations"] + found["gradients"] == pytest.approx(sum(kept.values()), rel=0.25)


def test_the_peak_of_mlx_is_the_growth_of_its_process(deep: Config) -> None:
    """Compares MLX's own count with the kernel's, in one process."""
    if not backends.installed("mlx"):  # importorskip would import it without a fast BLAS
        pytest.skip("MLX is not installed")
    config = deep.with_overrides("model.hidden_size=64")
    program = """
    import json, sys
    import icenet.tools.bench, icenet.engine.engine
    from icenet.core.report.resident_memory import ResidentMemory
    from icenet.core.config import Config
    from icenet.core.data.datasets import dataset_for
    config = Config.from_dict(json.loads(sys.argv[1]))
    engine = icenet.engine.engine.Engine(config, "cpu")
    batch = dataset_for(config).train_batch(0, 16)
    engine.read(engine.train_step({name: array[:1] for name, array in batch.items()}, 0, 1e-3))
    gauges = [icenet.tools.bench.Gauge(engine), ResidentMemory()]
    for gauge in gauges:
        gauge.begin()
    engine.read(engine.train_step(batch, 1, 1e-3))
    print(json.dumps([gauge.growth() for gauge in gauges]))
    """
    output = python(program, json.dumps(common.json_config(config)), **memory._GLIBC)
    mlx, kernel = json.loads(output.splitlines()[-1])
    assert mlx > 50e6 and kernel == pytest.approx(mlx, rel=0.3)


def test_a_report_of_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(backend: str, depth: int, precision: str, checkpointing: bool, peak: float) -> dict[str, Any]:
        parts = {"weights": 1e6, "optimizer": 2e6, "gradients": 1e6, "activations": peak - 4e6, "peak": peak}
        place = {"backend": backend, "device": "cpu", "source": "a guess", "depth": depth}
        return {**place, "precision": precision, "checkpointing": checkpointing, **parts}

    rows = [
        row(backend, depth, precision, saving, 5e6 * (1.5 if saving else depth) * (1 if precision == "fp32" else 0.6))
        for backend in BACKENDS
        for depth in (4, 24)
        for precision in ("fp32", "bf16")
        for saving in (False, True)
    ]
    report = memory.MemoryReport("mine", rows, memory.draw("mine", rows, tmp_path / "p.png"))
    ratios = {(r["backend"], r["depth"], r["precision"]): r["ratio"] for r in report.ratios()}
    assert len(ratios) == 8 and ratios["torch", 24, "bf16"] == pytest.approx(1.5 / 24)
    report.render()
    output = capsys.readouterr().out
    assert all(text in output for text in ("0.06 of the peak without", "stay in fp32", "On a CPU it saves less"))
    assert json.loads(json.dumps(report.as_dict()))["picture"] == str(tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


@pytest.mark.parametrize("peak", [1.3e6, 20.1e6, 80e9])
def test_the_labels_of_the_axis_of_memory_are_its_values(peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(memory.canvas, "save", lambda figure, path: figures.append(figure))
    rows = [
        {"backend": "mlx", "depth": depth, "precision": "fp32", "checkpointing": False, "peak": peak}
        for depth in (2, 4)
    ]
    memory.draw("mine", rows, Path("p.png"))
    [axes] = figures[0].axes
    figures[0].canvas.draw()
    labels = [float(label.get_text().replace(",", "")) for label in axes.get_yticklabels()]
    assert len(labels) > 2 and labels == pytest.approx(list(axes.get_yticks()))


@pytest.mark.parametrize(
    "arguments",
    [
        ["memory", "--depth", "4,x"],
        ["memory", "--depth", "0"],
        ["memory", "--precision", "int8"],
        ["memory", "--out", "p.png"],
        ["memory", "--set", "model.nope=1"],
        ["memory", "nosuch"],
        ["step", "--steps", "1"],
        ["dropout", "--rounds", "0"],
        ["dropout", "--device", "nosuch"],
        ["decode", "--batch", "0"],
        ["decode", "--side", "nosuch"],
        ["decode", "--dtype", "int8"],
        ["decode", "--new-tokens", "1"],
        ["prefill", "--prompts", "8"],
        ["batch", "--prompts", "64,512,32"],
        ["speed"],
    ],
)
def test_bad_requests_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and error_line(err)


@pytest.mark.parametrize("name", list(cli_bench.bench.commands))
def test_examples_of_the_help_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", name, "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.split("Examples:")[1].strip().splitlines()]
    command = cli_bench.bench.commands[name]
    for line in lines:
        assert line.startswith(f"icenet bench {name}")
        with command.make_context(name, line.split()[3:]) as context:
            assert context.params


# ---- processes and times --------------------------------------------------------------------------------


def test_a_failed_measurement_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = common.json_config(tiny(tmp_path).with_overrides("data.source=absent.txt"))
    task = {"config": config, "backend": "mlx", "device": "cpu"}
    with pytest.raises(IceNetError) as caught:
        common.measure_isolated("memory", task)
    assert is_one_line(caught.value, "bench memory on mlx: data.source 'absent.txt'")
    for code, names in (
        ("import os; os.kill(os.getpid(), 9)", ["killed by SIGKILL", "memory"]),
        ("raise ValueError('so it goes')", ["ValueError: so it goes"]),
        ("import os; os._exit(3)", ["code 3", "no result"]),
    ):
        monkeypatch.setattr(isolated, "_CHILD", code)
        with pytest.raises(IceNetError) as caught:
            common.measure_isolated("memory", task)
        assert is_one_line(caught.value, "bench memory on mlx: ", *names)


def test_timing_is_interleaved_and_ratios_are_pairwise() -> None:
    order: list[str] = []

    def function(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            time.sleep(seconds)

        return call

    times = common.time_interleaved({"a": function("a", 0.002), "b": function("b", 0.006)}, 3)
    assert order == ["a", "b"] * 4 and {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert min(times["a"]) >= 0.002 and min(times["b"]) >= 0.006
    ratio = common.ratio([2.0, 4.0, 60.0, 8.0, 20.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert ratio["median"] == 2.0 and ratio["low"] == 2.0 and ratio["high"] == 4.0
    assert common.ratio([3.0], [2.0]) == {"median": 1.5, "low": 1.5, "high": 1.5}


def test_quartiles_are_those_of_the_rounds() -> None:
    """They are numpy's, and never outside the values: those of 10 and 400 tokens per second are not below 0."""
    for values in ([400.0, 10.0], [3.0, 1.0, 2.0], [5.0, 1.0, 4.0, 2.0]):
        assert common.quartiles(values) == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]))


# ---- the minimal loop ----------------------------------------------------------------------------------------


@both_backends
def test_the_minimal_loop_trains_the_same_model(tmp_path: Path, backend: str) -> None:
    """It ends with the same weights as our engine, so the two loops do the same work."""
    keys = ("model.dropout=0", "training.schedule=constant", "training.warmup_steps=0", "training.weight_decay=0")
    config = tiny(tmp_path, *keys, "training.min_learning_rate=0", "training.max_grad_norm=0.5")
    dataset, tools = dataset_for(config), backends.module(backend, "tools.bench")
    engine, bare = backends.engine(config, backend), tools.BareLoop(config, "cpu")
    batches = [dataset.train_batch(number, 4) for number in range(5)]
    initial = engine.weights()
    for number, batch in enumerate(batches):
        assert engine.read(engine.train_step(batch, number, config.training.learning_rate)).grad_norm > 0.5
    bare.run(batches)
    ours, theirs = engine.weights(), bare.model.weights()
    for name in ours:
        if name.endswith("k_proj.bias"):
            continue  # the softmax does not depend on it: its gradient is rounding error
        moved = np.abs(ours[name] - initial[name]).max()
        # AdamW normalizes by the gradient: values with a gradient of rounding errors only move at random
        assert np.quantile(np.abs(ours[name] - theirs[name]), 0.99) < 1e-2 * moved, name


@both_backends
@pytest.mark.parametrize("more", [{}, pytest.param({"compile_model": True}, marks=pytest.mark.slow)])
def test_the_minimal_loop_handles_padding_and_dropout(tmp_path: Path, backend: str, more: dict[str, Any]) -> None:
    if more and backend == "torch":
        pytest.skip("torch.compile is slow, and the loop only wraps the model in it")
    config = tiny(tmp_path).with_overrides(*(f"model.{key}={str(value).lower()}" for key, value in more.items()))
    tools = backends.module(backend, "tools.bench")
    bare = tools.BareLoop(config, "cpu")
    dropouts = [type(module) for module in bare.model.modules() if "Dropout" in type(module).__name__]
    assert [kind.__module__.split(".")[0] for kind in dropouts] == 3 * [backend]
    ids = token_ids(4, 16, vocab_size=257)
    labels, mask = ids.copy(), np.ones((4, 16), np.int32)
    labels[0, 5:], mask[0, 5:] = -100, 0
    before = bare.model.weights()
    bare.run([{"inputs": ids, "labels": ids}] * 2)
    if not more:
        bare.run([{"inputs": ids, "labels": labels, "attention_mask": mask}] * 2)
    after = bare.model.weights()
    assert all(np.isfinite(array).all() for array in after.values())
    assert any(not np.array_equal(before[name], after[name]) for name in after)


class Recorder:
    """Acts as a trainer, its engine, its dataset and the minimal loop, and records the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.engine = self.dataset = self
        self.config = Config.from_dict(TINY)

    def train_batch(self, step: int, batch_size: int) -> Any:
        return {"inputs": step}

    def train_step(self, batch: Any, step: int, learning_rate: float, loss_scale: float) -> None:
        self.calls.append(f"own {step}")
        time.sleep(0.004)

    def run(self, batches: list[Any]) -> None:
        self.calls += [f"bare {batch['inputs']}" for batch in batches]
        time.sleep(0.001 * len(batches))

    def synchronize(self) -> None:
        self.calls.append("wait")


def test_the_two_loops_alternate() -> None:
    recorder: Any = Recorder()
    engine = step.AlternatingEngine(recorder, recorder, block=2, blocks=2)
    assert recorder.calls == [f"bare {number}" for number in range(step.WARM_UP)]
    recorder.calls.clear()
    for number in range(step.WARM_UP + 5):
        engine.train_step(recorder.train_batch(number, 4), number, 1e-3, 1.0)
    assert recorder.calls[step.WARM_UP :] == [
        *("wait", "bare 5", "bare 6", "own 5", "own 6"),
        *("wait", "bare 7", "bare 8", "own 7", "own 8"),
        *("wait", "own 9"),
    ]
    assert len(engine.own_seconds) == len(engine.bare_seconds) == 2
    assert min(engine.own_seconds) >= 0.004 and min(engine.bare_seconds) >= 0.001
    assert engine.calls is recorder.calls  # all other attributes are those of the engine


def test_a_step_is_compared(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str], no_plots: None
) -> None:
    """In this process. Tests of the memory show that a measurement works in its own."""
    monkeypatch.setattr(common, "measure_isolated", lambda name, task: step.measure(task))
    (tmp_path / "mine.yaml").write_text(tiny(tmp_path).to_yaml())
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "step", "mine.yaml", "--backend", "torch", "--steps", "16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (found,) = report["backends"]
    assert found["backend"] == "torch" and found["blocks"] * found["block"] == 16 and found["dropout"] == 0.1
    assert found["bare_ms"] > 0.1 and found["icenet_ms"] > 0.1
    assert found["ratio"]["low"] <= found["ratio"]["median"] <= found["ratio"]["high"]
    assert {file.name for file in tmp_path.iterdir()} == {"mine.yaml", "text.txt", "cache"}  # its run is deleted


# ---- inference ------------------------------------------------------------------------------------------------


class InProcess:
    """A side in this process, in place of `isolated.Worker`."""

    def __init__(self, name: str, device: str) -> None:
        self.session = sides.Session(name, device)

    def call(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        try:
            return json.loads(json.dumps(getattr(self.session, method)(*arguments)))
        except Exception as error:
            raise isolated.IsolatedError(" ".join(str(error).split())) from None

    def close(self) -> None:
        pass


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sides run in this process; the rates are those of small matrices."""
    if not backends.installed("mlx"):
        pytest.skip("MLX is not installed")
    monkeypatch.setattr(common, "start", lambda session, name, device: InProcess(name, device))
    monkeypatch.setattr(inference, "prepare", target.prepare)
    monkeypatch.setattr(sides, "_doubled", lambda first, last: [first])


SMALL = [f"model.{key}" for key in ("hidden_size=32", "num_layers=2", "num_heads=2", "vocab_size=257")]


def bench(row: str, *arguments: str) -> list[str]:
    """Returns the arguments of a measurement of a small model, whose context is shorter than the prompts."""
    sets = [part for override in [*SMALL, "model.max_seq_length=16"] for part in ("--set", override)]
    return ["bench", row, "gpt2", *arguments, *sets, "--device", "cpu", "--repeats", "2"]


def test_decoding_is_compared_with_peers_and_the_limit(
    in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    sizes = [
        "--batch",
        "1,3",
        "--prompt",
        "20",
        "--new-tokens",
        "4",
        "--side",
        "icenet mlx,icenet torch,transformers",
    ]
    assert cli.main(bench("decode", *sizes, "--json", "out.json")) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    assert out.count("icenet torch / this") == 2 and "limit" in out and "GB/s" in out
    assert [result["case"]["lengths"] for result in report["results"]] == [[20], [20] * 3]
    rates = report["rates"]["fp32"]
    for result in report["results"]:
        tokens, limit = 4 * len(result["case"]["lengths"]), result["limit"]
        by = {"memory": limit["nbytes"] / rates["bytes"], "compute": limit["operations"] / rates["operations"]}
        assert limit["value"] == pytest.approx(tokens / max(by.values()))
        assert limit["by"] == max(by, key=by.__getitem__)
        seconds = {entry["side"]: entry["seconds"] for entry in result["sides"]}
        assert list(seconds) == ["icenet mlx", "icenet torch", "transformers"]
        for entry in result["sides"]:
            name = entry["side"]
            assert entry["same_tokens"] == 5  # the weights and the prompts are the same
            assert entry["value"] == pytest.approx(np.median([tokens / one for one in seconds[name]]))
            assert entry["of_limit"] == pytest.approx(max(by.values()) / np.median(seconds[name]))
            for own in ("icenet mlx", "icenet torch"):
                pairs = [theirs / ours for theirs, ours in zip(seconds[name], seconds[own], strict=True)]
                assert entry["ratios"][own]["median"] == pytest.approx(np.median(pairs))
            assert entry["first_token_s"] > 0 and entry["cold_first_token_s"] > 0
    assert report["results"][0]["sides"][0]["peak_bytes"] > 4 * report["parameters"]
    assert cli.main(bench("decode", "--json", "out.json")) == 2
    assert is_one_line(capsys.readouterr().err, "out.json", "--overwrite")


@pytest.mark.parametrize(
    ("row", "arguments", "lengths"),
    [
        ("prefill", ["--prompts", "2x24"], [24, 24]),
        ("batch", ["--prompts", "3,4,12", "--new-tokens", "4", "--sample"], [4, 8, 12]),
        ("load", [], []),
        ("convert", [], []),
    ],
)
def test_rows_of_inference(
    in_process: None, row: str, arguments: list[str], lengths: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """A peer that fails or is not installed costs a line, and the other sides are measured."""
    assert cli.main(bench(row, *arguments, "--side", "icenet mlx,icenet torch,mlx-lm", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    for result in report["results"]:
        assert result["row"] == row and sorted(result["case"]["lengths"]) == lengths
        assert all(min(entry["value"], entry["of_limit"]) > 0 for entry in result["sides"])
    names = [entry["side"] for entry in result["sides"]]
    if row == "convert":
        assert names == ["icenet mlx"]
        assert [result["case"]["form"] for result in report["results"]] == ["canonical", "mlx", "mlx-lm"]
        return
    assert names[:2] == ["icenet mlx", "icenet torch"] and len(report["results"]) == 1
    if row == "load":
        assert result["unit"] == "s" and result["limit"]["nbytes"] > 4 * report["parameters"]
    installed = len(result["sides"]) == 3
    assert installed or (
        len(report["notes"]) == 1 and is_one_line(report["notes"][0], "mlx-lm", "mlx_lm", "installed")
    )


def test_reading_the_file_is_not_in_the_peak_of_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak is that of the first load: later ones use memory that was freed."""
    session = sides.Session("icenet torch", "cpu")
    events: list[str] = []
    monkeypatch.setattr(session, "_load", lambda variant="": events.append("load"))
    monkeypatch.setattr(sides, "_read_files", lambda folder: events.append("read") or 0.0)

    class Memory:
        source = sides.resident_memory.SOURCE
        begin = events.clear
        growth = staticmethod(lambda: 1000 * events.count("load") + 10 * events.count("read"))

    monkeypatch.setattr(session, "_memory", Memory())
    session.load("load", str(tmp_path), "fp32", False)
    for _ in range(2):
        session.measure("load", {})
    assert events == ["load", "read"] * 2 and session.peak() == 1000


def test_quantized_weights_next_to_those_as_they_are(in_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompt", "8", "--batch", "1", "--new-tokens", "3", "--bits", "4,8", "--group-size", "32"]
    arguments = bench("quantized", *sizes, "--side", "icenet mlx,icenet torch")
    assert cli.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    [result] = report["results"]
    entries = {entry["side"]: entry for entry in result["sides"]}
    names = ["icenet mlx", "icenet mlx, 4 bits", "icenet mlx, 8 bits"]
    assert list(entries) == [*names, *(name.replace("mlx", "torch") for name in names)]
    first, second = entries[names[0]], entries[names[1]]
    assert first["speedup"]["median"] == 1
    pairs = [plain / quantized for plain, quantized in zip(first["seconds"], second["seconds"], strict=True)]
    assert second["speedup"]["median"] == pytest.approx(np.median(pairs))
    config = target.config_of("gpt2", SMALL, 12)
    assert config is not None
    size, rates = limits.size_of(config, backends.meta_model(config)), report["rates"]["fp32"]
    for name, nbytes in zip(names, (4, 0.5 + 8 / 32, 1 + 8 / 32), strict=True):  # 32 values share a scale and a bias
        least, _ = limits.step(size, [10], nbytes, 4).seconds(rates)
        assert entries[name]["of_limit"] == pytest.approx(3 * least / np.median(entries[name]["seconds"]))


def test_a_draft_next_to_plain_decoding(in_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The text is the same; the part of accepted proposals is near the probability of agreement."""
    sizes = ["--prompt", "8", "--new-tokens", "40", "--agreement", "0.5"]
    assert (
        cli.main(bench("speculative", *sizes, "--side", "icenet mlx,icenet torch", "--repeats", "1", "--json")) == 0
    )
    [result] = json.loads(capsys.readouterr().out)["results"]
    assert [entry["side"] for entry in result["sides"]] == [
        *("icenet mlx", "icenet mlx, draft", "icenet torch", "icenet torch, draft")
    ]
    for plain, drafted in (result["sides"][:2], result["sides"][2:]):
        assert drafted["same_tokens"] == 41 and 0.3 < drafted["agreement"] < 0.7 and "agreement" not in plain
        assert drafted["ratios"] != plain["ratios"]
    assert cli.main(bench("speculative", *sizes[:4], "--agreement", "2")) == 2
    assert is_one_line(error_line(capsys.readouterr().err), "--agreement")
    assert cli.main(bench("speculative", "--sample")) == 2
    assert is_one_line(error_line(capsys.readouterr().err), "--sample", "no effect")
    assert cli.main(bench("load", "--sample")) == 2
    assert is_one_line(error_line(capsys.readouterr().err), "--sample", "no effect", "no tokens")
    assert cli.main(bench("quantized", "--bits", "7")) == 2
    assert is_one_line(error_line(capsys.readouterr().err), "--bits", "8")


def test_a_side_that_fails_costs_one_line(
    in_process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is measured again in the next case, in a new process."""
    prefill, started = sides.OwnModel.prefill, []

    def fail(self: sides.OwnModel, prompts: Any) -> Any:
        if self._model.backend == "mlx":
            raise MemoryError("out of\nmemory")
        return prefill(self, prompts)

    monkeypatch.setattr(sides.OwnModel, "prefill", fail)
    monkeypatch.setattr(
        common, "start", lambda session, name, device: started.append(name) or InProcess(name, device)
    )
    arguments = bench("prefill", "--prompts", "1x8", "--side", "icenet mlx,icenet torch", "--dtype", "fp32,bf16")
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("icenet torch / this") == 2 and "icenet mlx / this" not in out
    lines = [line for line in out.splitlines() if line.startswith("icenet mlx:")]
    assert len(lines) == 2 and all("prefill" in line and "out of memory" in line for line in lines)
    assert started == ["icenet mlx", "icenet torch", "icenet mlx", "icenet mlx"]


def test_ctrl_c_shows_the_rounds_that_are_done(
    in_process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def call(self: InProcess, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        calls.append(method)
        if calls.count("measure") == 2 * 2 + 3:  # two warm-up rounds, one that counts, and a half
            raise KeyboardInterrupt
        return original(self, method, *arguments)

    original = InProcess.call
    monkeypatch.setattr(InProcess, "call", call)
    arguments = bench("prefill", "--prompts", "1x8", "--side", "icenet mlx,icenet torch")
    assert cli.main([*arguments, "--repeats", "5"]) == 130
    out, err = capsys.readouterr()
    assert "icenet torch / this" in out and "Ctrl-C" in error_line(err.splitlines(keepends=True)[-1])


def test_the_start_of_processes(in_process: None, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Each process ends without an error; the two of a side are one that generates a token and one that reads."""
    programs: list[tuple[str, ...]] = []

    def time_process(*arguments: str) -> float:
        programs.append(arguments)
        return float(len(programs))

    monkeypatch.setattr(sides, "_time_process", time_process)
    assert cli.main([*bench("start", "--side", "icenet torch", "--json"), "--repeats", "1"]) == 0
    help_, token = json.loads(capsys.readouterr().out)["results"]
    assert (help_["sides"][0]["seconds"], token["sides"][0]["seconds"]) == ([5.0], [11.0])
    assert token["sides"][0]["of_limit"] == pytest.approx(12 / 11)
    assert (help_["limit"]["by"], token["limit"]["by"][:32]) == (
        "an empty process",
        "a process that imports the frame",
    )
    assert programs[4] == ("-m", "icenet", "--help") and programs[5] == ("-c", "pass")
    assert (
        "generate" in programs[10][1] and "import torch" in programs[11][1] and programs[10][2:] == programs[11][2:]
    )


@pytest.mark.parametrize(
    ("row", "target", "reason"),
    [("decode", "nosuch", "shapes: gpt2, "), ("load", "resnet-18", "generates no text")],
)
def test_a_target_is_checked_before_processes_start(
    row: str, target: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "start", lambda session, name, device: pytest.fail(f"{name} is started"))
    assert cli.main(["bench", row, target, "--repeats", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and is_one_line(error_line(err), target, reason)


def test_a_process_that_fails_says_why() -> None:
    assert 0 < sides._time_process("-c", "pass") < 60
    with pytest.raises(IceNetError) as caught:
        sides._time_process("-c", "raise ValueError('so it goes')")
    assert is_one_line(caught.value, "ValueError: so it goes")


def test_a_model_without_a_form_for_peers(in_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    arguments = ["bench", "decode", "quickstart", "--prompt", "8", "--batch", "1", "--new-tokens", "2"]
    sides_ = ["--side", "icenet torch,transformers", "--repeats", "1", "--device", "cpu"]
    assert cli.main([*arguments, *sides_, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [entry["side"] for entry in report["results"][0]["sides"]] == ["icenet torch"]
    assert is_one_line(report["notes"][0], "transformers", "model.positions")


def test_the_seconds_of_new_tokens() -> None:
    """The shortest call of one token is subtracted. A new process adds what only first calls do."""
    measured = inference.Measured([5.0, 9.0], [[1.0, 3.0], [1.5, 4.0], [1.1, 5.0]])
    assert measured.seconds(inference_rows.ROWS["decode"]) == [2.0, 3.0, 4.0]
    assert measured.first_token() == 1.1
    assert measured.cold_first_token(inference_rows.ROWS["decode"]) == 5 + 9 - 4
    assert measured.seconds(inference_rows.ROWS["load"]) == [1.0, 1.5, 1.1]
    assert measured.cold_first_token(inference_rows.ROWS["load"]) == 5


@pytest.mark.parametrize("experts", [None, 4])
def test_the_operations_of_a_prompt_are_those_that_pytorch_counts(experts: int | None) -> None:
    """PyTorch counts a forward pass with all logits and with all pairs of tokens."""
    torch = pytest.importorskip("torch")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    gated = {"feed_forward": "gated", "feed_forward_bias": False, "num_kv_heads": 1}
    options = {**gated, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 101, "max_seq_length": 64}
    if experts:
        options |= {"num_experts": experts, "experts_per_token": experts}  # all, which PyTorch can count
    config = Config.from_dict({"model": {"type": "transformer", **options}})
    model = backends.module("torch", "engine.build").build_model(config, "cpu", seed=0)
    model.eval()
    size = limits.size_of(config, model)
    assert size.parameters == model.num_params
    rows, length = 3, 12
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros((rows, length), dtype=torch.long))
    found = limits.prompt(size, [length] * rows, 4)
    logits = 2 * rows * (length - 1) * size.output
    pairs = rows * 2 * (length * length - length * (length + 1) // 2)
    assert found.operations + logits + 4 * pairs * size.query_width == counter.get_total_flops()


def test_the_bytes_of_a_step() -> None:
    """Compared with the sizes of the arrays of a cache and of the weights, counted by hand."""
    config = target.config_of("llama-1b", ["model.sliding_window=100", "model.num_layers=3"], 50)
    assert config is not None
    size = limits.size_of(config, backends.meta_model(config))
    width, heads, kv, wide, vocab = 2048, 32, 8, 8192, 128256
    block = 2 * width * width + 2 * width * width * kv // heads + 3 * width * wide + 2 * width
    assert size.parameters == 3 * block + width + vocab * width
    found = limits.step(size, [40, 400], 2, 2)
    assert found.nbytes == 2 * size.parameters + 2 * 3 * (40 + 100) * 2 * kv * 64
    assert found.seconds({"bytes": 1e9, "operations": 1e15}) == (pytest.approx(found.nbytes / 1e9), "memory")
    assert found.seconds({"bytes": 1e15, "operations": 1e9}) == (pytest.approx(found.operations / 1e9), "compute")


def test_a_worker_answers_after_an_error() -> None:
    with isolated.Worker("icenet.core.report.streams", "printable", "a\tb") as worker:
        assert worker.call("count", "b") == 1
        with pytest.raises(isolated.IsolatedError) as caught:
            worker.call("count", 3)
        assert is_one_line(caught.value, "TypeError")
        assert worker.call("upper") == "A\\TB"
    with isolated.Worker("icenet.core.report.streams", "printable", 3) as worker:
        with pytest.raises(isolated.IsolatedError) as caught:
            worker.call("upper")
        assert is_one_line(caught.value, "TypeError")
    assert isolated.call("builtins", "print", "on standard output") is None


# ---- dropout ----------------------------------------------------------------------------------------------


@both_backends
def test_the_dropouts_compared_are_keyed_and_framework_dropout(backend: str) -> None:
    tools = backends.module(backend, "tools.bench")
    keys = rng.fold(rng.key(0, "dropout", 0)[None, :], np.arange(8, dtype=np.uint64))
    pair = tools.DropoutPair((8, 64, 32), 0.25, keys, "cpu")
    found = {}
    for backward in (False, True):
        for name, apply in (("own", pair.native), ("keyed", pair.keyed)):
            found[name, backward] = np.asarray(apply(backward))
    words = np.stack([rng.bits(key, 64 * 32) for key in keys]).reshape(8, 64, 32)
    for backward in (False, True):
        assert np.array_equal(found["keyed", backward] != 0, words >= round(0.25 * 2**32))
        share = (found["own", backward] != 0).mean()
        assert share == pytest.approx(0.75, abs=0.02) and found["own", backward].shape == (8, 64, 32)


@pytest.mark.slow
def test_keyed_dropout_costs_little(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "dropout", "--rounds", "21", "--json", "--device", "cpu"]) == 0
    for found in json.loads(capsys.readouterr().out):
        for what in ("forward", "forward and backward"):
            # other load slows both, not always alike: the lower quartile counts
            assert found[what]["ratio"]["low"] <= 1.3, (found["backend"], what, found[what])


@pytest.mark.slow
def test_checkpointing_halves_the_peak_of_24_layers(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ["--set", "model.hidden_size=64", "--set", "training.batch_size=8", "--device", "cpu"]
    assert cli.main(["bench", "memory", "--depth", "4,24", "--precision", "fp32", *sizes, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    deepest = [found["ratio"] for found in report["ratios"] if found["depth"] == 24]
    assert len(deepest) == len(common.installed_backends(None)) and max(deepest) <= 0.5
    assert (tmp_path / "bench-memory.png").is_file()
