"""Plots of metrics and of a comparison of backends."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icenet.core.errors import IceNetError
from icenet.core.report import canvas, plots
from icenet.core.report.plots import plot_metrics, plot_parity
from icenet.core.report.streams import printable

REPOSITORY = Path(__file__).resolve().parents[3]


def pixels(path: Path) -> np.ndarray:
    image = pytest.importorskip("matplotlib.image")
    return np.asarray(image.imread(path))[..., :3]


def share_of(image: np.ndarray, colour: str) -> int:
    """Returns the number of pixels of a color."""
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
    for path in (good, bad):  # both curves are visible although they coincide
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
    """The import loads neither rich nor matplotlib. Without matplotlib there is no picture and no error.

    The backend of a notebook in the environment, which is not installed here, does not keep it from being imported.
    """
    pytest.importorskip("matplotlib")
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
del sys.meta_path[0]
import os
os.environ["MPLBACKEND"] = "no_backend"
from icenet.core.report import canvas
assert canvas.available() and os.environ["MPLBACKEND"] == "no_backend"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "p.png").exists()


NAMES = [
    *("x$y$z", r"$\frac{$", "_hidden", "a\nb\x1b[31m"),
    *("名前 العربية 🎉" + "n" * 300, os.fsdecode(b"r\xff\\$b")),
]


def test_names_are_drawn_literally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No formula, no hidden legend entry, no warning about glyphs (warnings are errors in the tests)."""
    drawn: list[str] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: _texts(figure, drawn) or canvas.save(figure, path))
    for name in NAMES:
        drawn.clear()
        plots.plot_metrics(run_of(3), tmp_path / "plot.png", title=name)
        if len(name) < 60:
            assert printable(name) in [text.replace(r"\$", "$") for text in drawn]
        assert all(len(text) < 120 for text in drawn)
    drawn.clear()
    curves = {name: [1.0, 2.0] for name in NAMES[:3]}
    plots.plot_parity(tmp_path / "p.svg", steps=[1, 2], curves=curves, gap=[0, 0], allowed=[1, 1], switch_label="$")
    assert {"x$y$z", r"$\frac{$", "_hidden"} <= {text.replace(r"\$", "$") for text in drawn}


def _texts(figure: Any, drawn: list[str]) -> None:
    from matplotlib.text import Text

    drawn += [text.get_text() for text in figure.findobj(Text)]
