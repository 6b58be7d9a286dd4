"""Measurements: that they measure what they say, on models small enough to count by hand or by other means."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, TINY, environment, tiny

from icenet.cli import bench as cli_bench
from icenet.cli import main as cli
from icenet.commands.bench import memory, process, step
from icenet.core import backends, rng
from icenet.core.config import Config
from icenet.core.data.datasets import dataset_for
from icenet.core.errors import IceNetError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A model whose activations weigh more than its weights: few units, many tokens."""
    sizes = ("model.num_layers=12", "model.max_seq_length=64", "training.batch_size=16", "model.dropout=0")
    return tiny(tmp_path_factory.mktemp("deep"), *sizes)


@pytest.fixture(scope="module")
def measured(deep: Config) -> Callable[[str, bool], dict[str, Any]]:
    """Its memory on a backend, with checkpointing or without, measured once."""

    @functools.cache
    def measure(backend: str, checkpointing: bool) -> dict[str, Any]:
        config = process.plain(deep.with_overrides(f"training.gradient_checkpointing={str(checkpointing).lower()}"))
        task = {"config": config, "backend": backend, "device": "cpu"}
        return process.measure_apart("memory", task, memory._GLIBC)

    return measure


# ---- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_halves_the_peak_of_a_deep_model(deep: Config, measured: Any, backend: str) -> None:
    without, saving = measured(backend, False), measured(backend, True)
    size = 4 * backends.engine(deep, backend).model.num_params
    for found in (without, saving):
        assert (found["weights"], found["gradients"], found["optimizer"]) == (size, size, 2 * size)
        assert found["peak"] >= found["weights"] + found["optimizer"] + found["activations"]
    assert saving["peak"] <= 0.5 * without["peak"]


def test_the_peak_of_pytorch_is_what_autograd_keeps(deep: Config, measured: Any) -> None:
    """Counted another way: the bytes of all that the forward pass saves for the backward pass."""
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
        loss = engine._mean_loss(engine._arrays(batch))
    assert loss.requires_grad
    found = measured("torch", False)
    assert found["activations"] + found["gradients"] == pytest.approx(sum(kept.values()), rel=0.25)


def test_the_peak_of_mlx_is_the_growth_of_its_process(deep: Config, tmp_path: Path) -> None:
    """MLX's own count against the kernel's, in one process."""
    pytest.importorskip("mlx.core")
    config = deep.with_overrides("model.hidden_size=64")
    code = f"""
import json
import icenet.tools.bench, icenet.engine.engine
from icenet.core.report.resident_memory import Resident
from icenet.core.config import Config
from icenet.core.data.datasets import dataset_for
config = Config.from_dict(json.loads({json.dumps(json.dumps(process.plain(config)))}))
engine = icenet.engine.engine.Engine(config, "cpu")
batch = dataset_for(config).train_batch(0, 16)
engine.read(engine.train_step({{name: array[:1] for name, array in batch.items()}}, 0, 1e-3))
gauges = [icenet.tools.bench.Gauge(engine), Resident()]
for gauge in gauges:
    gauge.begin()
engine.read(engine.train_step(batch, 1, 1e-3))
print(json.dumps([gauge.growth() for gauge in gauges]))
"""
    own = environment(tmp_path, **memory._GLIBC)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env=own)
    assert done.returncode == 0, done.stderr
    mlx, kernel = json.loads(done.stdout.splitlines()[-1])
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
    said = capsys.readouterr().out
    assert "0.06 of the peak without" in said and "moments stay in fp32" in said and "On a CPU it saves less" in said
    assert json.loads(json.dumps(report.as_dict()))["picture"] == str(tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments",
    [
        ["memory", "--depth", "4,x"],
        ["memory", "--depth", "0"],
        ["memory", "--precision", "int8"],
        ["memory", "--out", "p.png"],
        ["memory", "cnn-small", "--depth", "3"],
        ["memory", "nosuch"],
        ["step", "--steps", "1"],
        ["dropout", "--rounds", "0"],
        ["dropout", "--device", "nosuch"],
        ["speed"],
    ],
)
def test_bad_requests_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["bench", *arguments])
    out, err = capsys.readouterr()
    err = "".join(line for line in err.splitlines(keepends=True) if line.startswith("icenet:"))
    assert code in (1, 2) and out == "" and err.count("\n") == 1


@pytest.mark.parametrize("name", ["memory", "step", "dropout"])
def test_examples_of_the_help_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", name, "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.split("Examples:")[1].strip().splitlines()]
    command = cli_bench.bench.commands[name]
    for line in lines:
        assert line.startswith(f"icenet bench {name}")
        with command.make_context(name, line.split()[3:]) as context:
            assert context.params


# ---- processes and figures --------------------------------------------------------------------------------


def test_what_goes_wrong_in_a_child_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = process.plain(tiny(tmp_path).with_overrides("data.source=absent.txt"))
    task = {"config": config, "backend": "torch", "device": "cpu"}
    with pytest.raises(IceNetError, match=r"^bench memory on torch: data\.source 'absent\.txt' is not there"):
        process.measure_apart("memory", task)
    for code, said in (
        ("import os; os.kill(os.getpid(), 9)", r"killed by SIGKILL \(the kernel does that where"),
        ("raise ValueError('so it goes')", "ValueError: so it goes"),
        ("raise SystemExit(3)", "ended with 3 and no answer"),
    ):
        monkeypatch.setattr(process, "_CHILD", code.replace("{", "{{"))
        with pytest.raises(IceNetError, match=f"bench memory on torch: .*{said}") as caught:
            process.measure_apart("memory", task)
        assert "\n" not in str(caught.value)


def test_ways_take_turns_and_ratios_are_of_pairs() -> None:
    order: list[str] = []

    def way(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    times = process.interleaved({"a": way("a", 0.002), "b": way("b", 0.006)}, 3)
    assert order == ["a", "b"] * 4 and {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert min(times["a"]) >= 0.002 and min(times["b"]) >= 0.006
    found = process.ratio([2.0, 4.0, 60.0, 8.0, 10.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["median"] == 2.0 and found["low"] == 2.0 and found["high"] > 2.0
    assert process.ratio([3.0], [2.0]) == {"median": 1.5, "low": 1.5, "high": 1.5}


# ---- the bare loop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bare_loop_trains_the_same_model(tmp_path: Path, backend: str) -> None:
    """It ends where our engine does: what is compared is the same work, done by the framework's own parts."""
    keys = ("model.dropout=0", "training.schedule=constant", "training.warmup_steps=0", "training.weight_decay=0")
    config = tiny(tmp_path, *keys, "training.min_learning_rate=0", "training.max_grad_norm=0.5")
    dataset, room = dataset_for(config), backends.module(backend, "tools.bench")
    engine, bare = backends.engine(config, backend), room.BareLoop(config, "cpu")
    batches = [dataset.train_batch(number, 4) for number in range(5)]
    initial = engine.weights()
    for number, batch in enumerate(batches):
        assert engine.read(engine.train_step(batch, number, config.training.learning_rate)).grad_norm > 0.5
    bare.run(batches)
    ours, theirs = engine.weights(), bare.model.weights()
    for name in ours:
        if name.endswith("k_proj.bias"):
            continue  # a bias of all keys moves no softmax: its gradient is rounding
        moved = np.abs(ours[name] - initial[name]).max()
        # AdamW divides by the gradient's size: a value whose gradient is rounding moves at random by its share
        assert np.quantile(np.abs(ours[name] - theirs[name]), 0.99) < 1e-2 * moved, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("more", [{}, pytest.param({"compile_model": True}, marks=pytest.mark.slow)])
def test_the_bare_loop_takes_padding_and_dropout(tmp_path: Path, backend: str, more: dict[str, Any]) -> None:
    if more and backend == "torch":
        pytest.skip("torch.compile takes its time; the loop only wraps the model in it")
    config = tiny(tmp_path).with_overrides(*(f"model.{key}={str(value).lower()}" for key, value in more.items()))
    room = backends.module(backend, "tools.bench")
    bare = room.BareLoop(config, "cpu")
    dropouts = [type(module) for module in bare.model.modules() if "Dropout" in type(module).__name__]
    assert [kind.__module__.split(".")[0] for kind in dropouts] == 3 * [backend]
    ids = np.random.default_rng(0).integers(0, 257, (4, 16)).astype(np.int32)
    labels, mask = ids.copy(), np.ones((4, 16), np.int32)
    labels[0, 5:], mask[0, 5:] = -100, 0
    before = bare.model.weights()
    bare.run([{"inputs": ids, "labels": ids}] * 2)
    if not more:
        bare.run([{"inputs": ids, "labels": labels, "attention_mask": mask}] * 2)
    after = bare.model.weights()
    assert all(np.isfinite(array).all() for array in after.values())
    assert any(not np.array_equal(before[name], after[name]) for name in after)


class Diary:
    """Stands for a trainer, its engine, its data and the bare loop, and notes who was asked for what."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.engine = self.dataset = self
        self.config = Config.from_dict(TINY)

    def train_batch(self, step: int, batch_size: int) -> Any:
        return {"inputs": step}

    def train_step(self, batch: Any, step: int, learning_rate: float, loss_scale: float) -> None:
        self.entries.append(f"own {step}")
        time.sleep(0.004)

    def run(self, batches: list[Any]) -> None:
        self.entries += [f"bare {batch['inputs']}" for batch in batches]
        time.sleep(0.001 * len(batches))

    def synchronize(self) -> None:
        self.entries.append("wait")


def test_two_loops_take_turns() -> None:
    diary: Any = Diary()
    turns = step.TakingTurns(diary, diary, block=2, blocks=2)
    assert diary.entries == [f"bare {number}" for number in range(step.WARM_UP)]
    diary.entries.clear()
    for number in range(step.WARM_UP + 5):
        turns.train_step(diary.train_batch(number, 4), number, 1e-3, 1.0)
    assert diary.entries[step.WARM_UP :] == [
        *("wait", "bare 5", "bare 6", "own 5", "own 6"),
        *("wait", "bare 7", "bare 8", "own 7", "own 8"),
        *("wait", "own 9"),
    ]
    assert len(turns.own_seconds) == len(turns.bare_seconds) == 2
    assert min(turns.own_seconds) >= 0.004 and min(turns.bare_seconds) >= 0.001
    assert turns.entries is diary.entries  # everything else is the engine's


def test_a_step_is_compared(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(tiny(tmp_path).to_yaml())
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "step", "mine.yaml", "--backend", "torch", "--steps", "16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (found,) = report["backends"]
    assert found["backend"] == "torch" and found["blocks"] * found["block"] == 16 and found["dropout"] == 0.1
    assert found["bare_ms"] > 0.1 and found["icenet_ms"] > 0.1
    assert found["ratio"]["low"] <= found["ratio"]["median"] <= found["ratio"]["high"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.yaml", "text.txt"]  # its run is gone


# ---- dropout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_dropouts_compared_are_those_that_are_named(backend: str) -> None:
    room = backends.module(backend, "tools.bench")
    keys = rng.fold(rng.key(0, "dropout", 0)[None, :], np.arange(8, dtype=np.uint64))
    pair = room.DropoutPair((8, 64, 32), 0.25, keys, "cpu")
    found = {}
    for backward in (False, True):
        for name, way in (("own", pair.own), ("keyed", pair.keyed)):
            found[name, backward] = np.asarray(way(backward))
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
            # a machine that is busy with something else slows both, not always alike: the better quarter counts
            assert found[what]["ratio"]["low"] <= 1.3, (found["backend"], what, found[what])


@pytest.mark.slow
def test_the_criterion_of_24_layers(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ["--set", "model.hidden_size=64", "--set", "training.batch_size=8", "--device", "cpu"]
    assert cli.main(["bench", "memory", "--depth", "4,24", "--precision", "fp32", *sizes, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    deepest = [found["ratio"] for found in report["ratios"] if found["depth"] == 24]
    assert len(deepest) == len(process.backends_here(None)) and max(deepest) <= 0.5
    assert (tmp_path / "bench-memory.png").is_file()
