"""`icenet plot`: pictures of one or several runs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import failed_command, is_one_line, write_run

from icenet.commands import plot as overlay
from icenet.commands import plot_runs
from icenet.core.config import Config
from icenet.core.errors import IceNetError, UsageError
from icenet.core.report import canvas, plots
from icenet.core.report.metrics import MetricsLog


def colours(path: Path) -> dict[str, int]:
    """Returns the number of pixels of each color of the palette."""
    image = pytest.importorskip("matplotlib.image").imread(path)[..., :3]
    found = {}
    for colour in overlay.COLOURS[:6]:
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        found[colour] = int((np.abs(np.asarray(image) - wanted).max(axis=-1) < 0.02).sum())
    return found


def test_runs_are_drawn_over_each_other(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", changes=(40,)), write_run(tmp_path / "two", 60)
    picture = overlay.plot([one, two, one], tmp_path / "out" / "both.png")
    seen = [colour for colour, count in colours(picture).items() if count > 300]
    assert seen == list(overlay.COLOURS[:2])  # a run that is named twice is drawn once
    assert overlay.plot([one]) == one / "plot.png"
    assert colours(one / "plot.png")[canvas.ORANGE] == 0
    assert [file.name for file in picture.parent.iterdir()] == ["both.png"]


def test_equal_curves_are_all_visible(tmp_path: Path) -> None:
    """Runs whose losses differ visibly have no panel of differences."""
    one, two, far = (write_run(tmp_path / name) for name in ("one", "two", "far"))
    lines = [json.loads(line) for line in (far / "metrics.jsonl").read_text().splitlines()]
    raised = [{**line, "loss": line["loss"] + 0.5} for line in lines if "loss" in line]
    (far / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in raised))
    assert overlay._equal_curves(overlay.read([far, one, two])) == {2: 1}
    assert overlay._equal_curves(overlay.read([far, one])) == {}
    seen = colours(overlay.plot([one, two], tmp_path / "both.png"))
    assert seen[overlay.COLOURS[0]] > 3000 and seen[overlay.COLOURS[1]] > 3000


def test_the_difference_of_two_runs(tmp_path: Path) -> None:
    runs = overlay.read([write_run(tmp_path / "one"), write_run(tmp_path / "two", 60)])
    steps, values = overlay._differences(*runs)
    assert steps.tolist() == list(range(1, 61)) and not values.any()
    (runs[1].records)[0]["loss"] += 1e-4
    assert overlay._differences(*runs)[1][:2] == pytest.approx([1e-4, 0])


def test_the_labels_are_the_printed_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the end of the moving average."""
    labels: list[str] = []
    for module in (canvas, plots):
        monkeypatch.setattr(module, "end_labels", lambda axes, ends, *_: labels.extend(text for _, text, _ in ends))
    run = write_run(tmp_path / "run")
    overlay.plot([run])
    plots.plot_metrics(overlay.read([run])[0].records, tmp_path / "own.png")
    last = f"{2 + 3 * math.exp(-100 / 20):.4f}"
    assert labels == [last, f"train\n{last}", "validation\n2.0000"]
    from matplotlib.figure import Figure

    labels.clear()  # a loss that falls by a factor of 30 has a logarithmic axis
    records = [{"step": step, "loss": 3 * math.exp(-step / 20), "backend": "mlx"} for step in range(1, 101)]
    overlay._finish_loss(Figure().subplots(), [overlay.Run("falling", tmp_path, records)], None)
    assert labels == [f"{records[-1]['loss']:.4f}"]


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_labels_are_at_the_ends_of_the_curves(scale: str) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.set_yscale(scale)
    axes.set_ylim(0.01, 1)
    canvas.end_labels(axes, [(0.1, "a", "red"), (0.1, "b", "blue"), (0.9, "c", "green")], 0.05)
    places = {text.get_text(): text.xy[1] for text in axes.texts}
    height = {"linear": 0.09 / 0.99, "log": 0.5}[scale]
    assert places["a"] == pytest.approx(height) and places["b"] == pytest.approx(height + 0.05)
    assert places["c"] == pytest.approx({"linear": 0.89 / 0.99, "log": 1 + math.log10(0.9) / 2}[scale])


def test_the_kind_of_picture_follows_its_name(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    heads = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml", ".PDF": b"%PDF"}
    for suffix, head in heads.items():
        content = overlay.plot([run], tmp_path / f"p{suffix}").read_bytes()
        assert content.startswith(head)
        if suffix.islower():
            assert overlay.plot([run], tmp_path / f"p{suffix}").read_bytes() == content  # contains no date
    with pytest.raises(UsageError, match=r"p\.gif: the name of a picture ends in \.png, \.pdf or \.svg"):
        overlay.plot([run], tmp_path / "p.gif")


@pytest.mark.parametrize(("x", "smooth"), [("tokens", 1), ("time", 7)])
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
    assert scales[0](at) == pytest.approx(at * 0.05)  # a missing record does not shorten the time


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
    assert plot_runs._names(paths) == ["a/mlx", "a/torch", "b/mlx"]
    assert plot_runs._names(paths[:2]) == ["mlx", "torch"]
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
    with MetricsLog(run / "metrics.jsonl") as log:  # the last record of a step counts
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
    assert not overlay._rates_need_log_axis([cosine]) and not overlay._rates_need_log_axis([cosine, cosine / 3])
    assert overlay._rates_need_log_axis([cosine, cosine / 20])  # two runs, far apart
    assert overlay._rates_need_log_axis([1e-2 * 0.5 ** (12 * step)]) and not overlay._rates_need_log_axis([0 * step])
    assert overlay._wide([np.array([2.3, 0.01])], 0, 1, 20) and not overlay._wide([np.array([5.5, 1.4])], 0, 1, 20)
    assert [overlay._small(v) for v in (0, 0.05, 5e-4, 1e-3, 2.5e-5)] == ["0", "0.05", "5e-4", "1e-3", "2.5e-5"]
    assert [overlay._large(v) for v in (0, 950, 2e4, 1.5e6)] == ["0", "950", "20k", "1.5M"]


def test_a_run_without_metrics_among_several_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "metrics.jsonl").write_text('{"step"')
    for bad, expected, said in (
        ("absent", 2, "no such run"),
        ("empty", 2, "contains no metrics.jsonl"),
        ("young", 1, "contains no step yet"),
    ):
        code, line = failed_command(capsys, "plot", run, tmp_path / bad, "--out", tmp_path / "p.png")
        assert code == expected and bad in line and said in line
    assert not (tmp_path / "p.png").exists()
    assert failed_command(capsys, "plot")[0] == failed_command(capsys, "plot", run, "--smooth", "0")[0] == 2


def test_damaged_lines_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """But not an incomplete last line, which a kill leaves."""
    file = write_run(tmp_path / "run") / "metrics.jsonl"
    whole = len(overlay.read([file.parent])[0].records)
    file.write_bytes(b"\0" * 20 + b'\n{"step": 1\n[1]\n\n' + file.read_bytes() + b'{"step": ')
    assert len(overlay.read([file.parent])[0].records) == whole
    assert (
        is_one_line(caplog.messages[0], "metrics.jsonl", "damaged lines, left out: 3") and len(caplog.messages) == 1
    )
    file.write_bytes(b"\xff\n")
    with pytest.raises(IceNetError, match="no step; damaged lines: 1"):
        overlay.read([file.parent])


def test_no_matplotlib_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(IceNetError, match=r"pip install 'icenet\[plot\]'"):
        overlay.plot([run])
