"""Metrics on disk, progress on screens and in logs, and the pictures."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from icenet.core.errors import IceNetError
from icenet.core.report.metrics import MetricsLog
from icenet.core.report.plots import plot_metrics, plot_parity
from icenet.core.report.progress import Progress, duration, short_number

REPOSITORY = Path(__file__).resolve().parents[3]

# ---- metrics ----------------------------------------------------------------------------------------------


def test_records_come_back_and_every_line_is_strict_json(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"step": 1, "loss": np.float32(2.5), "learning_rate": 1e-3, "backend": "mlx", "list": [np.int64(3)]},
        {"step": 2, "loss": math.inf, "grad_norm": -math.inf},
        {"step": 3, "loss": math.nan, "text": "ä\n"},
    ]
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        for record in records:
            log.append(record)
            assert len(MetricsLog.read(path)) == record["step"]  # flushed at once

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=refuse)
    back = MetricsLog.read(path)
    assert back[0] == {"step": 1, "loss": 2.5, "learning_rate": 1e-3, "backend": "mlx", "list": [3]}
    assert back[1] == records[1]
    assert math.isnan(back[2]["loss"]) and back[2]["text"] == "ä\n"


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\0\0\0\0", b'{"step": 3, "loss": 1.0}', b'{"t": "\xc3'])
def test_torn_last_line(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert [record["step"] for record in MetricsLog.read(path)][:2] == [1, 2]
    with MetricsLog(path) as log:
        log.append({"step": 3, "loss": 2.0})
    assert MetricsLog.read(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 2.0}]
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    log.truncate_after(1)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_torn_line_longer_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for head in (b'{"step": 1}\n', b""):
        path.write_bytes(head + b'{"x": "' + b"y" * 200_000)
        with MetricsLog(path) as log:
            log.append({"step": 2})
        assert path.read_bytes() == head + b'{"step": 2}\n'


def test_truncate_after(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).truncate_after(3)
    assert not path.exists()
    log = MetricsLog(path)
    for step in range(1, 7):
        log.append({"step": step, "loss": math.nan})
        if step % 2 == 0:
            log.append({"step": step, "validation_loss": 1.0})
    log.append({"note": "without a step"})
    log.truncate_after(4)
    log.append({"step": 5, "again": True})
    log.close()
    back = MetricsLog.read(path)
    assert [record.get("step") for record in back] == [1, 2, 2, 3, 4, 4, None, 5]
    assert math.isnan(back[0]["loss"]) and back[-1] == {"step": 5, "again": True}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_kill_loses_at_most_the_line_being_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys; from icenet.core.report.metrics import MetricsLog; log = MetricsLog(sys.argv[1])\n"
        "for step in range(10**9):\n    log.append({'step': step, 'loss': step / 7})\n"
        "    print(step, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    seen = [int(process.stdout.readline()) for _ in range(200)]
    process.kill()
    process.wait()
    steps = [record["step"] for record in MetricsLog.read(path)]
    assert steps == list(range(len(steps))) and len(steps) > seen[-1]


def test_metrics_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IceNetError, match=r"cannot write the metrics .*metrics\.jsonl"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl").append({"step": 1})
    with pytest.raises(IceNetError, match=r"cannot read the metrics .*absent\.jsonl: no such file"):
        MetricsLog.read(tmp_path / "absent.jsonl")
    if os.path.exists("/dev/full"):
        (tmp_path / "full.jsonl").symlink_to("/dev/full")
        with pytest.raises(IceNetError, match="no space left"):
            MetricsLog(tmp_path / "full.jsonl").append({"step": 1})


# ---- progress ---------------------------------------------------------------------------------------------


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
        assert 0 < progress.steps_per_second < 600  # it slept 2 ms a step
    last = text_of(console).split("\r")[-1]
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
    rate.add(160.0, 400)  # the same step again says nothing
    assert rate.value == pytest.approx(2, rel=0.01)


def test_words_for_numbers() -> None:
    assert [short_number(value) for value in (0, 950, 1000, 12345, 123456, 1.25e6, 3e9)] == [
        *("0", "950", "1.00k", "12.3k", "123k", "1.25M", "3.00G")
    ]
    assert [duration(value) for value in (0.4, 75, 3600, 90061, 200000, math.inf)] == [
        *("0:00", "1:15", "1:00:00", "25:01:01", "2 d 7 h", "?")
    ]


# ---- pictures ---------------------------------------------------------------------------------------------


def pixels(path: Path) -> np.ndarray:
    image = pytest.importorskip("matplotlib.image")
    return np.asarray(image.imread(path))[..., :3]


def share_of(image: np.ndarray, colour: str) -> int:
    """Pixels of one colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(image - wanted).max(axis=-1) < 0.02).sum())


def run_of(steps: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 2 + 3 * math.exp(-step / 40)
        backend = "mlx" if step <= steps // 2 else "torch"
        records.append({"step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0, "backend": backend})
        if step % 20 == 0:
            records.append({"step": step, "validation_loss": loss + 0.1})
    return records


def test_metrics_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "run" / "plot.png"
    assert plot_metrics(run_of(100), path, "a run") == path
    image = pixels(path)
    assert image.shape[1] == 9 * 150 and path.stat().st_size > 10_000
    for colour in ("#0072B2", "#D55E00", "#009E73", "#CC79A7"):
        assert share_of(image, colour) > 100, colour
    assert [file.name for file in path.parent.iterdir()] == ["plot.png"]
    plot_metrics([record for record in run_of(100) if "loss" in record], path, "")
    assert share_of(pixels(path), "#D55E00") == 0  # no validation, no orange


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 1, "loss": 2.0}],
        [{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf, "learning_rate": 0.0}],
        [{"step": 5, "validation_loss": 2.0}],
        [{"step": step, "loss": 1.0, "grad_norm": 0.0} for step in range(50)],
        [{"step": 1, "loss": None, "backend": "mlx"}, {"loss": 3.0}],
    ],
)
def test_odd_metrics_are_drawn_too(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    assert plot_metrics(records, tmp_path / "p.png", "odd") == tmp_path / "p.png"
    assert len(pixels(tmp_path / "p.png"))


def parity(path: Path, gap: Any, **options: Any) -> Path | None:
    steps = list(range(1, 101))
    mlx = [2 + 3 * math.exp(-step / 40) for step in steps]
    return plot_parity(
        path,
        steps=steps,
        curves={"MLX": mlx, "PyTorch": mlx[50:]},
        gap=gap,
        allowed=[8e-7] * 50,
        switch_step=50,
        **options,
    )


def test_parity_is_drawn_and_judged(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from icenet.core.report import plots

    green, orange, pale = "#009E73", "#D55E00", plots.PALE_BLUE
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    assert parity(good, [1e-7] * 25 + [0.0] * 25) == good
    assert parity(bad, [1e-7] * 49 + [9e-7]) == bad
    verdict = (slice(60, 110), slice(None))  # the line below the title
    assert share_of(pixels(good)[verdict], green) > 200 and share_of(pixels(good)[verdict], orange) == 0
    assert share_of(pixels(bad)[verdict], orange) > 200 and share_of(pixels(bad)[verdict], green) == 0
    for path in (good, bad):  # both of two curves that coincide are to be seen
        upper = pixels(path)[110:550, 720:]
        assert share_of(upper, pale) > 500 and share_of(upper, orange) > 200


def test_verdict_in_words() -> None:
    from icenet.core.report.plots import _verdict

    at, limits = np.arange(1.0, 5.0), np.array([np.nan, 8e-7, 2e-7, 0.0])
    said, passed = _verdict(at, np.array([np.nan, 4e-7, 1.5e-7, 0.0]), limits, None)
    assert passed and said == "The same curve: largest distance 4.0e-7, at most 0.75 of the allowed distance (step 3)"
    said, passed = _verdict(at, np.array([np.nan, 4e-7, 3e-7, 0.0]), limits, None)
    assert not passed and said.endswith("up to 1.5 times the allowed distance (step 3)")
    for wrong in (1e-12, np.inf, np.nan):
        said, passed = _verdict(at, np.array([np.nan, 4e-7, 1e-7, wrong]), limits, None)
        assert not passed and said.startswith("The curves differ")
    assert _verdict(at, np.full(4, np.nan), limits, None) == ("no steps to compare", False)
    assert _verdict(at, np.array([np.nan, 4e-7, 1e-7, 0.0]), limits, False)[1] is False


@pytest.mark.parametrize("gap", [[0.0] * 50, [math.nan] * 50, [math.inf] * 50, [1e-7] * 100, []])
def test_odd_gaps_are_drawn_too(tmp_path: Path, gap: list[float]) -> None:
    pytest.importorskip("matplotlib")
    assert parity(tmp_path / "p.png", gap, passed=True, title="odd") == tmp_path / "p.png"


def test_a_gap_that_fits_no_step(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"gap has shape \(101,\), and there are 100 steps"):
        parity(tmp_path / "p.png", [0.0] * 101)


def test_a_plot_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    with pytest.raises(IceNetError, match=r"p\.png: cannot be written"):
        plot_metrics([], tmp_path / "file" / "p.png", "")


def test_late_imports_and_no_matplotlib(tmp_path: Path) -> None:
    """Importing loads neither rich nor matplotlib; without matplotlib there is no picture and no error."""
    code = f"""
import sys
import icenet.core.report.progress, icenet.core.report.plots as report
assert not {{"rich", "matplotlib", "mlx", "torch"}} & set(sys.modules), sorted(sys.modules)
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
assert report.plot_metrics([], {str(tmp_path / "p.png")!r}, "") is None
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "p.png").exists()
