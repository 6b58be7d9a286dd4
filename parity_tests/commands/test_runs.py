"""`icenet runs`: the list of runs and their states."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY, failed_command, is_one_line, tiny, write_run
from rich.console import Console

from icenet.cli import main as cli
from icenet.commands import runs as run_list
from icenet.core import backends
from icenet.core.config import Config
from icenet.core.errors import IceNetError
from icenet.core.report.metrics import MetricsLog
from icenet.core.runs.run_folder import locked
from icenet.core.training.trainer import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete run that changed its backend, and a stopped one."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny(folder, "training.keep_checkpoints=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("icenet.core.report.plots.plot_metrics", lambda *_, **__: None)
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
            pass  # listing does not take the lock
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
    assert problem.endswith("--resume names the newest intact checkpoint")
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
    code, line = failed_command(capsys, "runs", "absent")
    assert code == 2 and "absent: no such folder" in line


def test_links_list_each_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Under its own name; a folder that cannot be read is named and hides no other run."""
    runs = tmp_path / "runs"
    for name in ("deep/one", "two", "locked/three"):
        write_run(runs / name, 3)
    (runs / "a").symlink_to(runs / "deep")
    (runs / "latest").symlink_to(runs / "deep" / "one")
    (runs / "deep" / "loop").symlink_to(runs)
    assert set(by_name(runs)) == {"deep/one", "two", "locked/three"}
    listdir = os.listdir

    def refuse(path: Any) -> list[str]:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    caplog.clear()
    assert set(by_name(runs)) == {"deep/one", "two"}
    assert [is_one_line(record.message, f"{runs}/locked", "permission denied") for record in caplog.records] == [True]


@pytest.mark.slow
def test_a_hundred_runs_take_no_time(runs: Path, tmp_path: Path) -> None:
    for number in range(100):
        shutil.copytree(runs / "whole", tmp_path / "many" / f"run-{number}")
    begin = time.process_time()
    found = run_list.list_runs(tmp_path / "many").runs
    assert len(found) == 100 and {run.state for run in found} == {"complete"}
    assert time.process_time() - begin < 2  # measured 0.25 s


@pytest.mark.parametrize("width", [60, 80, 100, 130])
def test_the_table_fits_the_screen(
    runs: Path, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("COLUMNS", str(width)), ("TTY_COMPATIBLE", "1"), ("FORCE_COLOR", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert cli.main(["runs", str(runs)]) == 0
    out = capsys.readouterr().out
    lines = Console(force_terminal=False).render_str(out).plain.splitlines()
    assert "\u2026" not in out and "whole" in out
    assert ("when" in out) == (width >= 118) and len(lines) == 3, out
