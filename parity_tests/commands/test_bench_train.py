"""`icenet bench train` and `guide`: their sides in this process, on small models."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import both_backends, is_one_line

from icenet.cli import main as cli
from icenet.commands import isolated
from icenet.commands.bench import common, guide, loops, training, training_rows
from icenet.core import backends
from icenet.core.config import Config
from icenet.core.errors import UsageError

torch: Any = pytest.importorskip("torch")
pytest.importorskip("mlx")

SMALL = ("model.hidden_size=16", "model.num_layers=2", "model.vocab_size=50")
SETS = [part for change in SMALL for part in ("--set", change)]


def config(row: str, *overrides: str, **options: Any) -> Config:
    given = training_rows.Options(overrides=overrides, batch=2, length=12, **options)
    return training_rows.config_of(training_rows.ROWS[row], given, "cpu")


class Here:
    """A worker in this process. Sides in `failing` fail."""

    failing: tuple[str, ...] = ()

    def __init__(self, module: str, factory: str, name: str, device: str, environment: Any = None) -> None:
        self._arguments = name, device
        self._session: Any = None

    def call(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        if self._arguments[0] in self.failing:
            raise isolated.IsolatedError("no memory")
        try:
            self._session = self._session or loops.Session(*self._arguments)
            return json.loads(json.dumps(getattr(self._session, method)(*arguments)))
        except UsageError as error:
            raise isolated.IsolatedError(str(error)) from None

    def close(self) -> None:
        self._session = None


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "Worker", Here)
    monkeypatch.setattr(Here, "failing", ())
    monkeypatch.setattr(loops, "fastest", lambda cases: 1e11)


# ---- the work of a step -------------------------------------------------------------------------------------


def counted(chosen: Config, run: Any) -> float:
    """Returns the operations of the products of a forward pass, as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    model = backends.engine(chosen, "torch", "cpu").model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(model)
    return float(counter.get_total_flops())


@pytest.mark.parametrize(
    "overrides", [(), ("model.bottleneck_stride=conv1",), ("model.block=basic", "model.hidden_size=512")]
)
def test_the_operations_of_images_are_those_that_pytorch_counts(overrides: tuple[str, ...]) -> None:
    small = ("model.stage_depths=[1,2]", "model.stage_widths=[8,16]", "model.num_layers=3", "model.hidden_size=64")
    small = (*small, *overrides, *(["model.hidden_size=16"] if "model.block=basic" in overrides else []))
    chosen = config("cnn", *small).with_overrides("data.image_size=33")
    expected = counted(chosen, lambda model: model(torch.zeros(2, 3, 33, 33)))
    assert training_rows.operations(chosen) == 3 * expected


def test_the_operations_of_texts_are_those_that_pytorch_counts() -> None:
    chosen = config("gpt", *SMALL)
    products = counted(chosen, lambda model: model(torch.zeros(2, 12, dtype=torch.int32)))
    attention = 2 * 2 * 4 * 16 * 12 * 12  # PyTorch's counter counts all pairs, if at all
    pairs = 2 * 2 * 4 * 16 * 12 * 13 // 2
    assert training_rows.operations(chosen) / 3 - pairs in (products, products - attention)


# ---- the sides ----------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("row", ["gpt", "lstm"])
def test_loops_learn(row: str, backend: str) -> None:
    """All sides train: the loss of repeated batches falls from that of a random guess."""
    for name in (f"icenet {backend}", "torch loop" if backend == "torch" else "mlx.nn loop"):
        session = loops.Session(name, "cpu")
        session.prepare(common_config(row))
        batches = session._batches[:1]
        first = session._loop.run(batches)
        assert first == pytest.approx(np.log(50), rel=0.3)
        assert session._loop.run(batches * 30) < first, name
        measured = session.measure(2)
        assert measured["seconds"] > 0 and measured["peak_bytes"] >= 0


def common_config(row: str) -> dict[str, Any]:
    return json.loads(json.dumps(config(row, *SMALL).to_dict()))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("here")
def test_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--row", "gpt", "--batch", "2", "--length", "12", "--repeats", "2", "--seconds", "0.001", *SETS]
    arguments += ["--device", "cpu"]  # a GPU has compiled sides, too
    path = tmp_path / "train.json"
    assert cli.main(["bench", "train", *arguments, "--json", str(path)]) == 0
    assert "data wait" in capsys.readouterr().out
    report = json.loads(path.read_text())
    [result] = report["results"]
    sides = {entry["side"]: entry for entry in result["sides"]}
    assert sides.keys() == {"icenet mlx", "icenet torch", "torch loop", "mlx.nn loop"}
    for entry in sides.values():
        assert len(entry["seconds"]) == 2
        assert (entry["data_wait"] is None) == loops.KINDS[entry["side"]].is_peer
        assert 0 <= (entry["data_wait"] or 0) < 1
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert entry["speeds"].keys() == {"icenet mlx", "icenet torch"}
        assert entry["of_limit"] == pytest.approx(entry["value"] * result["operations"] / 24 / 1e11)
        own = sides["icenet torch"]["seconds"]
        ratios = [a / b for a, b in zip(entry["seconds"], own, strict=True)]
        assert entry["speeds"]["icenet torch"]["median"] == pytest.approx(np.median(ratios))
    [note] = [note for note in report["notes"] if "compiled: not measured" in note]
    assert is_one_line(note, *(name for name, kind in loops.KINDS.items() if kind.compiled))
    assert cli.main(["bench", "train", *arguments, "--side", "icenet torch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["title"] == result["title"]
    assert cli.main(["bench", "train", *arguments, "--side", "torch loop", "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)["results"][0]["sides"]
    assert entry["of_limit"] > 0  # the rate of the machine is that of the peer's framework


@both_backends
def test_the_wait_for_images(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches come from a data set and go to the device as bytes. The first step of a measurement does not count."""
    small = ("model.stage_depths=[1]", "model.stage_widths=[8]", "model.num_layers=1", "model.hidden_size=32")
    chosen = config("cnn", *small, "model.vocab_size=3")
    session = loops.Session(f"icenet {backend}", "cpu")
    session.prepare(json.loads(json.dumps(chosen.to_dict())))
    assert 0 <= session.data_wait(3) < 1
    assert session._loop._engine.pixel_scale is None

    now = [0.0]

    class Waiting(loops.Prefetch):
        """Three seconds of each step are a wait, and one is not."""

        def batch(self, step: int) -> Any:
            now[0] += 4
            found = super().batch(step)
            self.waited = 3.0
            return found

    monkeypatch.setattr(loops, "Prefetch", Waiting)
    monkeypatch.setattr(loops.time, "perf_counter", lambda: now[0])
    assert session.data_wait(2) == 0.75


@pytest.mark.usefixtures("here")
def test_a_side_that_fails_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Here, "failing", ("torch loop",))
    options = training_rows.Options(
        overrides=SMALL, only=("icenet torch", "torch loop"), batch=2, length=12, seconds=0.001, repeats=1
    )
    report = training.run({"gpt": training_rows.ROWS["gpt"]}, options)
    assert [entry["side"] for entry in report.results[0]["sides"]] == ["icenet torch"]
    assert any(is_one_line(note, "torch loop", "no memory") for note in report.notes)


@pytest.mark.usefixtures("here")
def test_other_programs_are_no_reason_of_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Here, "failing", tuple(loops.KINDS))
    monkeypatch.setattr(training.os, "getloadavg", lambda: (1e4, 0.0, 0.0))
    assert cli.main(["bench", "cpu", "--row", "gpt-quickstart"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert "10000" in lines[0]
    assert is_one_line(lines[-1], "icenet mlx", "no memory") and "10000" not in lines[-1]


TWO = training_rows.Options(
    overrides=SMALL, only=("icenet torch", "torch loop"), batch=2, length=12, seconds=0.001, repeats=5, device="cpu"
)


@pytest.mark.usefixtures("here")
def test_slow_steps_have_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 50 s: two rounds of two sides take 200 s, and three more than the limit."""
    monkeypatch.setattr(loops.Session, "_timed", lambda self, steps: 50.0)
    lines: list[str] = []
    report = training.run({"gpt": training_rows.ROWS["gpt"]}, replace(TWO, limit=250.0), lines.append)
    assert [entry["seconds"] for entry in report.results[0]["sides"]] == [[50.0] * 2] * 2
    assert any(is_one_line(note, "2 of 5 rounds", "--batch", "--limit 600") for note in report.notes)
    told = [line for line in lines if "round " in line and " left" in line]
    assert [line.partition(";")[2] for line in told] == [
        " about 3 minutes left", " about 150 s left", " about 100 s left", " about 50 s left",
    ]  # fmt: skip
    assert "round 2 of 2, torch loop" in told[-1]


@pytest.mark.usefixtures("here")
def test_rounds_that_are_slower_than_expected_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round takes 20 s in place of some milliseconds, as next to a program that starts after the first steps."""
    now, waits = [0.0], []

    def measure(self: loops.Session, steps: int) -> dict[str, Any]:
        now[0] += 10
        return {"seconds": 0.001, "processor_s": 1.0, "peak_bytes": 0}

    monkeypatch.setattr(loops.Session, "measure", measure)
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loops.Session, "data_wait", lambda self, steps: waits.append(steps) or 0.0)
    report = training.run({"gpt": training_rows.ROWS["gpt"]}, replace(TWO, limit=30.0))
    assert [entry["seconds"] for entry in report.results[0]["sides"]] == [[0.001] * 2] * 2
    assert any(is_one_line(note, "2 of 5 rounds", "40 s", "--batch", "--side") for note in report.notes)
    assert waits == [1]  # steps, as in other rows that are slow


@pytest.mark.usefixtures("here")
def test_steps_in_which_a_gpu_captures_graphs_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch captures its third step. The fourth to sixth of a side tell how many steps a round has."""
    seconds, steps = iter([50.0, 0.5, 0.001]), []

    def measure(self: loops.Session, count: int) -> dict[str, Any]:
        steps.append(count)
        return {"seconds": next(seconds), "processor_s": 0.0, "peak_bytes": 0}

    monkeypatch.setattr(common.Sides, "device", "gpu")
    monkeypatch.setattr(loops.Session, "measure", measure)
    monkeypatch.setattr(loops.Session, "data_wait", lambda self, steps: 0.0)
    options = replace(TWO, only=("icenet torch",), seconds=1.0, repeats=1, precision="fp32")
    report = training.run({"gpt": training_rows.ROWS["gpt"]}, options)
    assert steps == [3, 3, 2]
    assert report.results[0]["sides"][0]["seconds"] == [0.001]


def test_a_long_first_step_is_told() -> None:
    lines: list[str] = []
    told = threading.Event()

    def notify(text: str) -> None:
        lines.append(text)
        told.set()

    with common.waiting(notify, "gpt: first step", every=0.001):
        assert told.wait(10)
    count = len(lines)
    assert lines[0] == "gpt: first step, 0 s so far"
    assert len(lines) == count  # none after the block


@pytest.mark.usefixtures("here")
def test_processor_time(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--row",
        "lstm-1x128",
        "--batch",
        "2",
        "--length",
        "12",
        "--repeats",
        "3",
        "--seconds",
        "0.001",
        *SETS,
    ]
    assert cli.main(["bench", "cpu", *arguments]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("LSTM, 1 x 128", "icenet mlx, ms", "icenet torch, ms", "mlx / torch"))
    assert cli.main(["bench", "cpu", *arguments, "--side", "icenet torch", "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)["results"]
    [entry] = result["sides"]
    assert len(entry["processor_s"]) == 3 and min(entry["processor_s"]) > 0


@pytest.mark.usefixtures("here")
def test_a_side_without_a_step_in_time_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(self: Here, method: str, *arguments: Any, timeout: float | None = None, call: Any = Here.call) -> Any:
        if method == "prepare" and self._arguments[0] == "torch loop":
            raise isolated.TimeoutReached(f"no result within {timeout:g} s")
        return call(self, method, *arguments)

    monkeypatch.setattr(Here, "call", call)
    report = training.run({"gpt": training_rows.ROWS["gpt"]}, replace(TWO, limit=20.0))
    assert [entry["side"] for entry in report.results[0]["sides"]] == ["icenet torch"]
    assert any(is_one_line(note, "torch loop", "60 s", "--batch", "--limit", "--row") for note in report.notes)


@pytest.mark.usefixtures("here")
def test_ctrl_c_shows_what_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In the second round of the second row."""
    calls = []

    def measure(self: loops.Session, steps: int, measure: Any = loops.Session.measure) -> Any:
        calls.append(steps)
        if len(calls) == 7:  # two of them before the rounds
            raise KeyboardInterrupt
        return measure(self, steps)

    monkeypatch.setattr(loops.Session, "measure", measure)
    arguments = ["--row", "gpt,lstm", "--batch", "2", "--length", "12", "--repeats", "3", "--seconds", "0.001", *SETS]
    arguments += ["--device", "cpu"]  # a GPU takes more steps before the rounds
    assert cli.main(["bench", "train", *arguments, "--side", "icenet torch"]) == 130
    out, err = capsys.readouterr()
    assert "a transformer" in out and "an LSTM" in out and "Ctrl-C" in err.splitlines()[-1]


@pytest.mark.usefixtures("here")
def test_ctrl_c_before_the_rounds_shows_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """IceNet has made its first steps, and the loop has not."""

    def measure(self: loops.Session, steps: int, measure: Any = loops.Session.measure) -> Any:
        if self._kind.is_peer:
            raise KeyboardInterrupt
        return measure(self, steps)

    monkeypatch.setattr(loops.Session, "measure", measure)
    report = training.run({"gpt": training_rows.ROWS["gpt"]}, TWO)
    assert [entry["side"] for entry in report.results[0]["sides"]] == ["icenet torch"]
    assert isinstance(report.interruption, KeyboardInterrupt)
    assert any(is_one_line(note, "gpt", "first steps") for note in report.notes)


@pytest.mark.usefixtures("here")
def test_ctrl_c_in_the_first_round_shows_the_first_steps_of_all_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def measure(self: loops.Session, steps: int, measure: Any = loops.Session.measure) -> Any:
        calls.append(steps)
        if len(calls) == 4:  # the loop's, after one of IceNet
            raise KeyboardInterrupt
        return measure(self, steps)

    monkeypatch.setattr(loops.Session, "measure", measure)
    report = training.run({"gpt": training_rows.ROWS["gpt"]}, TWO)
    assert [entry["side"] for entry in report.results[0]["sides"]] == ["icenet torch", "torch loop"]
    assert any(is_one_line(note, "gpt", "first steps") for note in report.notes)


@pytest.mark.usefixtures("here")
def test_the_guides_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert [(row.reference, row.gpu[0]) for row in guide.ROWS.values()] == [
        ("500 tok/s", 32), ("300 tok/s", 16), ("150 tok/s", 8), ("1000 img/s", 64), ("800 tok/s", 64),
    ]  # fmt: skip
    arguments = ["--row", "lstm", "--batch", "2", "--length", "12", "--repeats", "1", "--seconds", "0.001", *SETS]
    assert cli.main(["bench", "guide", *arguments, "--backend", "torch", "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)["results"]
    [entry] = result["sides"]
    assert result["reference"] == "800 tok/s"
    assert entry["of_reference"] == pytest.approx(entry["value"] / 800)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["train", "--row", "gpt,cm"], ["'cm'", "gpt, lstm, cnn"]),
        (["guide", "--row", "gpt"], ["'gpt'", "transformer-small"]),
        (["cpu", "--row", "lstm"], ["'lstm'", "lstm-2x256"]),
        (["train", "--side", "jax"], ["'jax'", "icenet mlx"]),
        (["train", "--set", "model.hidden_sise=3"], ["hidden_sise", "hidden_size"]),
        (["cpu", "--side", "icenet mlx", "--backend", "torch"], ["--side icenet mlx", "--backend torch"]),
        (["decode", "--side", "mlx-lm", "--backend", "torch"], ["--side mlx-lm", "--backend torch"]),
        (["speculative", "--side", "mlx-lm"], ["--side mlx-lm", "icenet mlx, icenet torch"]),
        (["train", "--limit", "nan"], ["--limit", "nan", "finite"]),
        (["cpu", "--seconds", "inf"], ["--seconds", "inf", "finite"]),
        (["speculative", "--agreement", "nan"], ["--agreement", "nan", "finite"]),
    ],
)
def test_misuse_is_one_line(arguments: list[str], names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert is_one_line(capsys.readouterr().err.strip().splitlines()[-1], *names)
