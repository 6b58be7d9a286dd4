"""Progress on a terminal, in a notebook and in a log file."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import TINY, tiny
from rich.console import Console

from icenet.core.report.progress import Progress, duration, short_number


def screen(*, terminal: bool, width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_terminal_shows_a_bar_with_all_there_is_to_know() -> None:
    console = screen(terminal=True)
    with Progress(100, 40, console, tokens_per_step=1000) as progress:
        for step in range(41, 101):
            time.sleep(0.002)
            progress.update(step, loss=5 / step, learning_rate=1.25e-3, ignored=object())
        progress.note("saved [bold]step[/bold] 100")
    last = text_of(console).split("\r")[-1]
    speed = re.search(r"([\d.]+)k tok/s", last)
    assert speed and float(speed[1]) < 600  # it slept 2 ms in each step of 1,000 tokens
    assert "100/100  loss 0.0500  lr 1.25e-03" in last and "k tok/s" in last and "in 0:0" in last
    assert "saved [bold]step[/bold] 100\n" in text_of(console)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bar_fits_the_screen(width: int) -> None:
    console = screen(terminal=True, width=width)
    with Progress(2000, 0, console, tokens_per_step=1000) as progress:
        for step in range(1, 600):
            progress.update(step, loss=2.34567, learning_rate=1e-3, tokens_per_second=12345.0)
    last = text_of(console).split("\r")[-1]
    assert "599/2,000" in last or "599/2000" in last
    assert "loss 2.3457" in last and "12.3k tok/s" in last and "left" in last and "…" not in last
    assert ("lr" in last) == (width >= 78)


def test_log_file_gets_few_plain_lines() -> None:
    console = screen(terminal=False, width=40)
    with Progress(100, 0, console, 1000, line_seconds=0.05) as progress:
        for step in range(1, 101):
            time.sleep(0.001)
            progress.update(step, loss=1.0, learning_rate=1e-3)
    lines = text_of(console).splitlines()
    assert 1 <= len(lines) <= 10 and "\x1b" not in text_of(console) and "\r" not in text_of(console)
    assert "step 100/100  loss 1.0000  lr 1.00e-03" in lines[-1]
    console = screen(terminal=False)
    with Progress(100, 0, console) as progress:
        for step in range(1, 101):
            progress.update(step, loss=math.nan)
    assert len(text_of(console).splitlines()) == 1 and "loss nan" in text_of(console)  # ten seconds have not passed


def test_an_interrupted_run_tells_where_it_was() -> None:
    console = screen(terminal=False)
    with pytest.raises(KeyboardInterrupt), Progress(100, 0, console) as progress:
        progress.update(37, loss=1.0)
        raise KeyboardInterrupt
    assert "step 37/100" in text_of(console)


def test_quiet_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    console = screen(terminal=True)
    for quiet in (Progress(3, 0, console, quiet=True), Progress(3, quiet=True)):
        with quiet as progress:
            progress.update(1, 1.0)
            progress.note("nothing")
    assert text_of(console) == "" and capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_update_costs_next_to_nothing(terminal: bool) -> None:
    with Progress(10**6, 0, screen(terminal=terminal), 1000) as progress:
        begin = time.process_time()
        for step in range(1, 20001):
            progress.update(step, 1.0, learning_rate=1e-3)
        spent = time.process_time() - begin
    assert spent / 20000 < 100e-6  # measured 0.4 microseconds; a step takes a thousand times more


def test_speed_follows_the_last_seconds() -> None:
    progress = Progress(1000, quiet=True)
    rate = progress._rate
    rate.start(0.0, 0)
    for step in range(1, 101):
        rate.add(step * 0.1, step)
    assert rate.value == pytest.approx(10)
    for step in range(101, 401):
        rate.add(10 + (step - 100) * 0.5, step)
    assert rate.value == pytest.approx(2, rel=0.01)
    rate.add(160.0, 400)  # the same step again has no effect
    assert rate.value == pytest.approx(2, rel=0.01)


def test_words_for_numbers() -> None:
    assert [short_number(value) for value in (0, 950, 1000, 12345, 123456, 1.25e6, 3e9)] == [
        *("0", "950", "1.00k", "12.3k", "123k", "1.25M", "3.00G")
    ]
    assert [duration(value) for value in (0.4, 75, 3600, 90061, 200000, math.inf)] == [
        *("0:00", "1:15", "1:00:00", "25:01:01", "2 d 7 h", "?")
    ]


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
    assert "1200/2000" in frame and "/s" not in progress.status() and full >= 10  # 60 % of the bar


@pytest.mark.parametrize("extra", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1", "TERM": "xterm"}])
def test_a_log_file_stays_plain(tmp_path: Path, extra: dict[str, str]) -> None:
    """CI sets these variables, with which rich would draw a bar to the file."""
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
    assert len(notebook.outputs) == 1 and 2 <= len(notebook.outputs[0]) <= 6  # at most four per second
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
