"""Tables and results on standard output: names are complete in a file or a pipe, and on a narrow terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import tiny, write_run
from rich.console import Console

from icenet.commands.bench import common
from icenet.commands.info import ModelReport
from icenet.commands.predict import Predictions
from icenet.commands.runs import list_runs
from icenet.commands.schedule import GroupRow, ScheduleReport
from icenet.commands.train import print_result
from icenet.core.report.console import new_console
from icenet.core.runs.early_stopping import EarlyStopping
from icenet.core.training.trainer import Result

NAME = "encoder.blocks.0." + "a_very_long_name_of_a_layer_" * 4 + "weight"


def show(what: str, folder: Path) -> None:
    """Prints a table with the long name."""
    config = tiny(folder)
    if what == "info":
        ModelReport(NAME, config, 10, {NAME: 10}, 40, {}).render()
    elif what == "schedule":
        ScheduleReport("x", config.training, [GroupRow("adamw", 0.1, 1.0, 0.1, NAME, 3, 100)]).render(None)
    elif what == "runs":
        if not (folder / NAME).exists():
            write_run(folder / NAME)
        list_runs(folder).render()
    elif what == "predict":
        import numpy as np

        Predictions([Path(NAME)], ["cat", "dog"], np.array([[0.25, 0.75]])).render()
    else:
        common.console().print(common.table("title", [{"case": NAME, "ms": "1.0"}], ["ms"]))


@pytest.mark.parametrize("what", ["info", "schedule", "runs", "predict", "bench"])
def test_names_are_complete(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show(what, tmp_path)
    piped = capsys.readouterr().out
    assert any(NAME in line for line in piped.splitlines()) and "…" not in piped
    for name in ("TTY_COMPATIBLE", "FORCE_COLOR"):  # what rich takes for a terminal
        monkeypatch.setenv(name, "1")
    show(what, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines and not [line for line in lines if "…" in line]


def test_the_width_of_a_terminal_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert new_console(force_terminal=True).width == Console(force_terminal=True).width == 80
    assert new_console(force_terminal=False).width > 1000


def test_the_result_says_that_a_run_stopped_early(capsys: pytest.CaptureFixture[str]) -> None:
    """It is the only output with `--quiet`."""
    values: dict[str, Any] = {"run": Path("r"), "loss": 2.0, "validation_loss": 2.5, "plot": None}
    best = EarlyStopping(20, 2.25, 3)
    print_result(Result(**values, step=50, checkpoint=Path("c"), early_stopping=best, stopped_early=True))
    out = capsys.readouterr().out
    assert "stopped early: 3 evaluations" in out and "2.2500 at step 20" in out
    print_result(Result(**values, step=50, checkpoint=Path("c"), early_stopping=best))
    assert "stopped early" not in capsys.readouterr().out
