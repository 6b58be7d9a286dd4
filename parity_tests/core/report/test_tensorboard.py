"""TensorBoard event files, read back with TensorBoard's own reader."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import write_run

from icenet.core.errors import IceNetError
from icenet.core.report import tensorboard
from icenet.core.report.metrics import MetricsLog


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Returns the values that TensorBoard's reader finds, by tag and step."""
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
        assert scalars(tmp_path / "board")["train/loss"] == {1: 2.5}  # during the run
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
        board.begin(begin, [{"step": begin, "loss": 99.0}])  # the history counts only if the folder has no events
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
