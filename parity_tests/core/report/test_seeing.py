"""Seeing runs: pictures of several, the list of all, TensorBoard's events, and progress on every kind of screen."""

from __future__ import annotations

import functools
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from helpers import TINY, environment, is_one_line, tiny
from rich.console import Console

from icenet.cli import main as cli
from icenet.commands import plot as overlay
from icenet.commands import runs as run_list
from icenet.core import backends
from icenet.core.config import Config
from icenet.core.errors import IceNetError, UsageError
from icenet.core.report import canvas, tensorboard
from icenet.core.report.metrics import MetricsLog
from icenet.core.report.progress import Progress
from icenet.core.training.run_folder import locked
from icenet.core.training.trainer import Trainer

SPEED = 4 * 32 / 0.05
"""Tokens a second of a run whose steps of 4 rows of 32 tokens take 0.05 s."""


def write_run(folder: Path, steps: int = 100, *, changes: tuple[int, ...] = (), **extra: Any) -> Path:
    """A run's configuration and metrics, without training it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(Config.from_dict(TINY, ["training.max_steps=200"]).to_yaml())
    names = ["mlx", "torch"]
    with MetricsLog(folder / "metrics.jsonl") as log:
        for step in range(1, steps + 1):
            backend = names[sum(step > change for change in changes) % 2]
            record = {"step": step, "loss": 2 + 3 * math.exp(-step / 20), "learning_rate": 1e-3, "grad_norm": 1.0}
            log.append({**record, "tokens_per_second": SPEED, "backend": backend, **extra})
            if step % 20 == 0:
                log.append({"step": step, "validation_loss": 3 - step / 100, "backend": backend})
    return folder


def colours(path: Path) -> dict[str, int]:
    """How many pixels have each of the palette's colours."""
    image = pytest.importorskip("matplotlib.image").imread(path)[..., :3]
    found = {}
    for colour in overlay.COLOURS[:6]:
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        found[colour] = int((np.abs(np.asarray(image) - wanted).max(axis=-1) < 0.02).sum())
    return found


# ---- icenet plot ------------------------------------------------------------------------------------------


def test_runs_are_drawn_over_each_other(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", changes=(40,)), write_run(tmp_path / "two", 60)
    picture = overlay.plot([one, two, one], tmp_path / "out" / "both.png")
    seen = [colour for colour, count in colours(picture).items() if count > 300]
    assert seen == list(overlay.COLOURS[:2])  # a run that is named twice is drawn once
    assert overlay.plot([one]) == one / "plot.png"
    assert colours(one / "plot.png")[canvas.ORANGE] == 0
    assert [file.name for file in picture.parent.iterdir()] == ["both.png"]


def test_the_kind_of_picture_follows_its_name(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    heads = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml", ".PDF": b"%PDF"}
    for suffix, head in heads.items():
        content = overlay.plot([run], tmp_path / f"p{suffix}").read_bytes()
        assert content.startswith(head)
        assert overlay.plot([run], tmp_path / f"p{suffix}").read_bytes() == content  # no date within
    with pytest.raises(UsageError, match=r"p\.gif: the name of a picture ends in \.png, \.pdf or \.svg"):
        overlay.plot([run], tmp_path / "p.gif")


@pytest.mark.parametrize("x", ["step", "tokens", "time"])
@pytest.mark.parametrize("smooth", [None, 1, 7])
def test_every_axis_and_mean(tmp_path: Path, x: str, smooth: int | None) -> None:
    run = write_run(tmp_path / "run", changes=(10, 20, 30, 40))
    assert colours(overlay.plot([run], None, smooth, x))[canvas.BLUE] > 300


def test_a_step_lies_where_its_tokens_and_its_time_are(tmp_path: Path) -> None:
    run = overlay.read([write_run(tmp_path / "run")])[0]
    at = np.array([1.0, 50.0, 100.0])
    for x, size, label in (("step", 1, "step"), ("tokens", 4 * 32, "tokens"), ("time", 0.05, "time in training")):
        scales, said = overlay._axis([run], x)
        assert said.startswith(label) and scales[0](at) == pytest.approx(at * size)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.folder / "metrics.jsonl").write_text("".join(line for line in lines if '"step": 50,' not in line))
    scales, _ = overlay._axis(overlay.read([run.folder]), "time")
    assert scales[0](at) == pytest.approx(at * 0.05)  # a line that was lost takes no time away


def test_images_are_counted_as_images(tmp_path: Path) -> None:
    text, images = write_run(tmp_path / "text"), tmp_path / "images"
    images.mkdir()
    (images / "config.yaml").write_text(Config.from_yaml("cnn-digits", ["training.batch_size=10"]).to_yaml())
    with MetricsLog(images / "metrics.jsonl") as log:
        for step in range(1, 9):
            log.append({"step": step, "loss": 1 / step, "images_per_second": 100.0})
    run = overlay.read([images])[0]
    assert run.unit == "images" and run.items_per_step() == 10
    assert run.seconds()[1] == pytest.approx(0.1 * np.arange(1, 9))
    overlay.plot([text, images], tmp_path / "p.png")
    with pytest.raises(UsageError, match="--x tokens: some of these runs are trained on tokens and some on images"):
        overlay.plot([text, images], tmp_path / "p.png", x="tokens")


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "runs" / name for name in ("a/mlx", "a/torch", "b/mlx")]
    assert overlay._names(paths) == ["a/mlx", "a/torch", "b/mlx"]
    assert overlay._names(paths[:2]) == ["mlx", "torch"]
    run = write_run(tmp_path / "run", 100, changes=(30, 60))
    (found,) = overlay.read([run / "metrics.jsonl"])
    assert found.backends == [(1, "mlx"), (31, "torch"), (61, "mlx")] and found.changes == [31, 61]
    assert overlay._caption(found) == "run  (mlx → torch → mlx)"


def test_a_run_under_way_and_a_cut_off_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 30)
    whole = overlay.read([run])[0].curve("loss")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "loss": 1.')
    (again,) = overlay.read([run])
    assert [list(part) for part in again.curve("loss")] == [list(part) for part in whole]
    with MetricsLog(run / "metrics.jsonl") as log:  # a step taken twice counts as it was last
        log.append({"step": 30, "loss": 0.5})
        log.append({"step": 31, "loss": math.nan})
    steps, values = overlay.read([run])[0].curve("loss")
    assert list(steps) == list(range(1, 31)) and values[-1] == 0.5
    overlay.plot([run], tmp_path / "p.png")


@pytest.mark.parametrize(
    "record",
    [{"loss": 1.0}, {"loss": math.nan}, {"validation_loss": 0.0}, {"loss": 0.0, "grad_norm": 0, "learning_rate": 0}],
)
def test_odd_runs_are_drawn_too(tmp_path: Path, record: dict[str, Any]) -> None:
    (tmp_path / "run").mkdir()
    with MetricsLog(tmp_path / "run" / "metrics.jsonl") as log:
        log.append({"step": 1, **record})
    assert overlay.plot([tmp_path / "run"]).stat().st_size > 5000


def test_the_mean_is_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=200)
    ours = canvas.smoothed(values, 9)
    assert ours[20:180] == pytest.approx(np.convolve(values, np.ones(9) / 9, "same")[20:180])
    assert list(canvas.smoothed(values, 1)) == pytest.approx(list(values))


def test_axes_are_logarithmic_where_values_are_far_apart() -> None:
    step = np.linspace(0, 1, 500)
    cosine = 1e-3 * np.minimum(1, step / 0.05) * (0.5 + 0.5 * np.cos(np.pi * step))
    assert not overlay._rates_want_logs([cosine]) and not overlay._rates_want_logs([cosine, cosine / 3])
    assert overlay._rates_want_logs([cosine, cosine / 20])  # two runs, far apart
    assert overlay._rates_want_logs([1e-2 * 0.5 ** (12 * step)]) and not overlay._rates_want_logs([0 * step])
    assert overlay._wide([np.array([2.3, 0.01])], 0, 1, 20) and not overlay._wide([np.array([5.5, 1.4])], 0, 1, 20)
    assert [overlay._small(v) for v in (0, 0.05, 5e-4, 1e-3, 2.5e-5)] == ["0", "0.05", "5e-4", "1e-3", "2.5e-5"]
    assert [overlay._large(v) for v in (0, 950, 2e4, 1.5e6)] == ["0", "950", "20k", "1.5M"]


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Exit code and the one line of complaint of a command in this process."""
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("icenet: ") and err.count("\n") == 1
    return code, err


def test_a_run_without_metrics_among_several_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "metrics.jsonl").write_text('{"step"')
    for bad, said in (("absent", "no such run"), ("empty", "contains no metrics.jsonl"), ("young", "contains no step yet")):
        code, line = one_line(capsys, "plot", run, tmp_path / bad, "--out", tmp_path / "p.png")
        assert code == 1 and bad in line and said in line
    assert not (tmp_path / "p.png").exists()
    assert one_line(capsys, "plot")[0] == one_line(capsys, "plot", run, "--smooth", "0")[0] == 2


def test_no_matplotlib_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(IceNetError, match=r"pip install 'icenet\[plot\]'"):
        overlay.plot([run])


# ---- icenet runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that is complete and changed its backend, and one that was stopped."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny(folder, "training.keep_checkpoints=2")
    Trainer.start(config, folder / "runs" / "whole", backend="torch", quiet=True).fit(until=10)
    Trainer.resume(folder / "runs" / "whole", backend="mlx", quiet=True).fit()
    Trainer.start(config, folder / "runs" / "deep" / "er" / "half", backend="torch", quiet=True).fit(until=10)
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "runs", tmp_path / "runs"))


def by_name(folder: Path) -> dict[str, run_list.RunState]:
    return {run.name: run for run in run_list.list_runs(folder).runs}


def test_runs_are_listed_with_how_far_they_are(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> str:
        raise AssertionError("a checkpoint was hashed")

    monkeypatch.setattr("icenet.core.weights.files.checksum", refuse)
    os.utime(runs / "deep" / "er" / "half" / "metrics.jsonl", (4e9, 4e9))
    assert [run.name for run in run_list.list_runs(runs).runs] == ["deep/er/half", "whole"]  # the newest first
    found = by_name(runs)
    whole, half = found["whole"], found["deep/er/half"]
    records = MetricsLog.read(runs / "whole" / "metrics.jsonl")
    best = min((r["validation_loss"], r["step"]) for r in records if "validation_loss" in r)
    assert (whole.state, whole.step, whole.max_steps, whole.backends) == ("complete", 20, 20, ["torch", "mlx"])
    assert whole.loss == [r["loss"] for r in records if "loss" in r][-1]
    assert (whole.validation_loss, whole.validation_step) == best
    assert (half.state, half.step, half.backends, half.model) == ("stopped", 10, ["torch"], "transformer")
    assert whole.num_params == backends.meta_model(Config.from_dict(TINY)).num_params > 257 * 32


def test_a_run_in_training_says_so(runs: Path) -> None:
    with locked(runs / "whole"):
        assert by_name(runs)["whole"].state == "running"
        with pytest.raises(IceNetError, match="another process trains this run"), locked(runs / "whole"):
            pass  # looking took nothing away
    assert by_name(runs)["whole"].state == "complete"
    (runs / "whole" / ".lock").unlink()
    assert by_name(runs)["whole"].state == "complete" and not (runs / "whole" / ".lock").exists()


@pytest.mark.parametrize(
    ("file", "said"),
    [("model.safetensors", "cut short"), ("optimizer.safetensors", "cut short"), ("state.json", "cannot be read")],
)
def test_a_damaged_run_says_what_is_wrong(runs: Path, file: str, said: str, capsys: Any) -> None:
    path = runs / "whole" / "checkpoints" / "step-00000020" / file
    path.write_bytes(path.read_bytes()[:-3])
    found = by_name(runs)["whole"]
    problem = str(found.problem)
    assert found.state == "damaged" and "step-00000020 is damaged" in problem and said in problem
    assert problem.endswith("resume uses the checkpoint before it")
    assert cli.main(["runs", str(runs)]) == 0
    assert "whole: step-00000020 is damaged" in capsys.readouterr().out
    (runs / "whole" / "config.yaml").write_text("a: [")
    assert by_name(runs)["whole"].state == "damaged"
    Trainer.resume(runs / "deep" / "er" / "half", quiet=True)  # and nothing was changed


def test_a_run_that_stopped_early_is_complete(runs: Path) -> None:
    run = runs / "deep" / "er" / "half"
    config = (run / "config.yaml").read_text()
    assert "early_stopping: null" in config
    (run / "config.yaml").write_text(config.replace("early_stopping: null", "early_stopping: 3"))
    state = run / "checkpoints" / "step-00000010" / "state.json"
    for waited, expected in ((2, "stopped"), (3, "complete")):
        stored = {**json.loads(state.read_text()), "best": {"step": 5, "validation_loss": 1.0, "waited": waited}}
        text = json.dumps(stored)
        state.write_text(text)
        manifest = json.loads((state.parent / "manifest.json").read_text())
        manifest["files"]["state.json"]["bytes"] = len(text)
        (state.parent / "manifest.json").write_text(json.dumps(manifest))
        assert by_name(runs)["deep/er/half"].state == expected


def test_json_of_runs_is_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "runs" / "young", 3)
    with MetricsLog(run / "metrics.jsonl") as log:
        log.append({"step": 4, "loss": math.nan, "backend": "mlx"})
    assert cli.main(["runs", str(tmp_path / "runs"), "--json"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    (found,) = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (found["name"], found["step"], found["loss"], found["state"]) == ("young", 4, "NaN", "stopped")
    assert found["num_params"] is None and found["when"].endswith("+00:00")


def test_nothing_there_is_a_friendly_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["runs"]) == 0
    assert is_one_line(capsys.readouterr().out, "no runs in runs", "icenet train")
    assert cli.main(["runs", "--json"]) == 0 and json.loads(capsys.readouterr().out) == []
    code, line = one_line(capsys, "runs", "absent")
    assert code == 2 and "absent: no such folder" in line


def test_a_hundred_runs_take_no_time(runs: Path, tmp_path: Path) -> None:
    for number in range(100):
        shutil.copytree(runs / "whole", tmp_path / "many" / f"run-{number}")
    begin = time.process_time()
    found = run_list.list_runs(tmp_path / "many").runs
    assert len(found) == 100 and {run.state for run in found} == {"complete"}
    assert time.process_time() - begin < 2  # measured 0.25 s


def test_the_table_fits_the_screen(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (60, 80, 100, 130):
        done = subprocess.run(
            [sys.executable, "-m", "icenet", "runs", str(runs)],
            env={**environment(runs), "COLUMNS": str(width), "TTY_COMPATIBLE": "1", "FORCE_COLOR": "1"},
            capture_output=True,
            text=True,
        )
        lines = Console(force_terminal=False).render_str(done.stdout).plain.splitlines()
        assert done.returncode == 0 and "…" not in done.stdout and "whole" in done.stdout
        assert ("when" in done.stdout) == (width >= 118) and len(lines) == 3, done.stdout


# ---- TensorBoard ------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard's own reader shows: value by step, by tag."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={accumulator.SCALARS: 0})
    found.Reload()
    shown = {tag: found.Scalars(tag) for tag in found.Tags()["scalars"]}
    for tag, events in shown.items():
        steps = [event.step for event in events]
        assert steps == sorted(set(steps)), f"{tag}: a step is shown twice"
    return {tag: {event.step: event.value for event in events} for tag, events in shown.items()}


def test_metrics_are_events_too(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with tensorboard.TensorBoardLog(tmp_path / "board") as board:
        board.begin(0)
        board.append({"step": 1, "loss": 2.5, "learning_rate": 1e-3, "backend": "mlx", "skipped": False})
        assert scalars(tmp_path / "board")["train/loss"] == {1: 2.5}  # as it goes on, not at its end
        board.append({"step": 2, "loss": math.nan, "grad_norm": math.inf})
        board.append({"step": 2, "validation_loss": 3.0, "validation_accuracy": 0.5})
        board.append({"loss": 1.0})
    found = scalars(tmp_path / "board")
    assert math.isnan(found["train/loss"].pop(2)) and found.pop("train/grad_norm") == {2: math.inf}
    assert found.pop("train/learning_rate") == {1: pytest.approx(1e-3)}
    assert found == {
        "train/loss": {1: 2.5},
        "train/skipped": {1: 0.0},
        "validation/loss": {2: 3.0},
        "validation/accuracy": {2: 0.5},
    }


def test_a_resumed_run_shows_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    folder = tmp_path / "board"
    for begin, end, value in ((0, 9, 1.0), (5, 8, 2.0), (6, 12, 3.0)):
        board = tensorboard.TensorBoardLog(folder)
        board.begin(begin, [{"step": begin, "loss": 99.0}])  # a history counts only where there are no events
        for step in range(begin + 1, end + 1):
            board.append({"step": step, "loss": value + step})
        board.close()
        behind = time.time() - 3600
        monkeypatch.setattr(time, "time", functools.partial(float, behind))  # another machine's clock
        files = sorted(folder.iterdir())
        files[-1].write_bytes(files[-1].read_bytes() + b"\x18\0\0\0\0\0\0\0torn")  # a kill while it was writing
    expected = {step: 1.0 + step for step in range(1, 6)} | {6: 8.0} | {step: 3.0 + step for step in range(7, 13)}
    assert scalars(folder)["train/loss"] == {0: 99.0} | expected


def test_a_log_tells_the_one_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with MetricsLog(tmp_path / "metrics.jsonl", tensorboard.TensorBoardLog(tmp_path / "board")) as log:
        for step in (1, 2, 3):
            log.append({"step": step, "loss": np.float32(0.5 * step), "n": np.int64(step)})
        log.truncate_after(1)
        log.append({"step": 2, "loss": 8.0})
    assert scalars(tmp_path / "board")["train/loss"] == {1: 0.5, 2: 8.0}
    assert scalars(tmp_path / "board")["train/n"] == {1: 1.0}
    assert [record["step"] for record in MetricsLog.read(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_branch_brings_its_history(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = write_run(tmp_path / "run", 30)
    board = tensorboard.TensorBoardLog(tmp_path / "board")
    board.begin(20, MetricsLog.read(run / "metrics.jsonl"))
    board.append({"step": 21, "loss": 1.0})
    found = scalars(tmp_path / "board")
    records = {r["step"]: r["loss"] for r in MetricsLog.read(run / "metrics.jsonl") if "loss" in r}
    assert found["train/loss"] == pytest.approx({step: records[step] for step in range(1, 21)} | {21: 1.0})
    assert found["validation/loss"] == pytest.approx({20: 2.8})


def test_events_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    with pytest.raises(IceNetError, match=r"cannot write TensorBoard's events in .*training\.tensorboard=false"):
        tensorboard.TensorBoardLog(tmp_path / "file" / "board").append({"step": 1, "loss": 1.0})


def test_tensorboard_is_late_and_its_absence_one_line() -> None:
    code = """
import sys
import icenet.core.report.tensorboard as room
from icenet.core.errors import UsageError
assert not {"tensorboard", "google"} & set(sys.modules)
sys.modules["tensorboard"] = None
try:
    room.TensorBoardLog("board")
except UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "pip install 'icenet[tensorboard]'" in done.stdout


# ---- progress ---------------------------------------------------------------------------------------------


def run_progress(console: Console | None, steps: range = range(1, 600), total: int = 2000) -> None:
    with Progress(total, steps.start - 1, console, tokens_per_step=1000, label="torch cuda:0") as progress:
        for step in steps:
            progress.update(step, 2.34567, learning_rate=1e-3, tokens_per_second=12345.0)


@pytest.mark.parametrize("width", [24, 32, 40, 50, 60, 78, 90, 110, 140])
def test_a_bar_says_what_fits(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    run_progress(console)
    assert isinstance(console.file, io.StringIO)
    last = console.file.getvalue().split("\r")[-1].replace("\x1b[2K", "").split("\n")[0]
    assert "599/2000" in last and "…" not in last and len(last) <= width
    words = ("loss 2.3457", "left", "12.3k tok/s", "lr 1.00e-03", "torch cuda:0")
    assert [word in last for word in words] == [width >= least for least in (32, 40, 60, 78, 110)]


def test_a_bar_follows_a_window_made_narrower() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    with Progress(100, 0, console, label="mlx cpu") as progress:
        progress.update(1, 2.0, learning_rate=1e-3)
        assert sum(map(len, progress.fitting(90))) > 30
        assert sum(map(len, progress.fitting(30))) <= 30 and progress.fitting(1) == ["1/100"]


def test_a_resumed_run_begins_where_it_was() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with Progress(2000, 1200, console) as progress:
        pass
    assert isinstance(console.file, io.StringIO)
    frame = console.file.getvalue().split("\r")[-1]
    full = frame.count("━")
    assert "1200/2000" in frame and progress.steps_per_second == 0 and full >= 10  # 60 % of the bar


@pytest.mark.parametrize("extra", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1", "TERM": "xterm"}])
def test_a_log_file_stays_plain(tmp_path: Path, extra: dict[str, str]) -> None:
    """CI sets such variables, and a file full of carriage returns is what rich makes of them."""
    code = """
import sys, time
from icenet.core.report.progress import Progress
with Progress(60, 10, label="mlx cpu", line_seconds=0.0) as progress:
    for step in range(11, 61):
        time.sleep(0.001)
        progress.update(step, 2.0, learning_rate=1e-3)
    progress.note("step 60: validation loss 1.5")
"""
    with open(tmp_path / "log", "wb") as log:
        subprocess.run([sys.executable, "-c", code], stderr=log, env={**os.environ, **extra}, check=True)
    lines = (tmp_path / "log").read_bytes()
    assert b"\r" not in lines and b"\x1b" not in lines
    assert 2 <= lines.count(b"\n") <= 13 and b"step 60/60  loss 2.0000  lr 1.00e-03" in lines


def test_a_terminal_without_a_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "dumb"})
    run_progress(console)
    assert isinstance(console.file, io.StringIO)
    assert "\r" not in console.file.getvalue() and "step 599/2000  loss 2.3457" in console.file.getvalue()


class Notebook:
    """A stand-in for IPython.display: outputs that can be replaced, each kept as the texts that it showed."""

    def __init__(self) -> None:
        self.outputs: list[list[dict[str, str]]] = []

    def display(self, shown: Any, display_id: bool = False) -> Any:
        history = [shown._repr_mimebundle_(None, None)]
        self.outputs.append(history)
        handle = ModuleType("handle")
        handle.update = lambda shown: history.append(shown._repr_mimebundle_(None, None))  # type: ignore[attr-defined]
        return handle


def test_a_notebook_has_one_output_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook, module = Notebook(), ModuleType("IPython.display")
    module.display = notebook.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr("rich._console", Console(file=io.StringIO(), force_jupyter=True))
    console = Console(file=io.StringIO(), force_jupyter=True)
    with Progress(50, 10, console, label="<mlx>") as progress:
        for step in range(11, 51):
            time.sleep(0.01)
            progress.update(step, 5 / step)
    assert len(notebook.outputs) == 1 and 2 <= len(notebook.outputs[0]) <= 6  # four a second at most
    first, last = notebook.outputs[0][0], notebook.outputs[0][-1]
    assert "10/50" in first["text/html"] and "50/50" in last["text/html"] and "loss 0.1000" in last["text/html"]
    assert "&lt;mlx&gt;" in last["text/html"] and "\u2501" in last["text/html"]  # the label and the bar


def test_a_notebook_without_ipython_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    monkeypatch.setitem(sys.modules, "IPython", None)
    run_progress(Console(file=io.StringIO(), force_jupyter=True))


@pytest.mark.slow
def test_in_a_real_notebook(tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    tiny(tmp_path)
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_code_cell(f"""
import os
from pathlib import Path
os.environ["ICENET_CACHE"] = {str(tmp_path / "cache")!r}
from icenet.core.config import Config
from icenet.core.training.trainer import Trainer
config = Config.from_dict({TINY!r}, ["data.source={tmp_path / "text.txt"}"])
Trainer.start(config, Path({str(tmp_path / "run")!r}), backend="torch").fit().step
""")
    ]
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    bars = [o for o in outputs if "\u2501" in o.get("data", {}).get("text/html", "")]
    assert len(bars) == 1 and "20/20" in bars[0]["data"]["text/html"]
    notes = [o["data"]["text/plain"] for o in outputs if "validation loss" in str(o.get("data"))]
    assert len(notes) == 2 and not [o for o in outputs if o["output_type"] in ("stream", "error")]
    assert outputs[-1]["data"]["text/plain"] == "20"
