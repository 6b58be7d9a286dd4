"""`icenet quickstart`: its verdict, the files that it writes, and the files that it keeps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import icenet, is_one_line, losses, same_bits, state, tree, write_text

from icenet.cli.main import main
from icenet.commands import quickstart
from icenet.core.errors import UsageError
from icenet.core.runs import checkpoint

pytest.importorskip("mlx")
pytest.importorskip("torch")

SMALL = [
    "training.max_steps=12",
    "training.warmup_steps=2",
    "training.batch_size=4",
    "training.eval_every=6",
    "model.hidden_size=32",
    "model.max_seq_length=32",
    "generation.max_new_tokens=40",
    "device=cpu",
]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return [*SMALL, f"data.source={write_text(tmp_path / 'text.txt')}"]


def options(overrides: list[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def test_a_small_quickstart(small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quick"
    assert main(["quickstart", "--out", "quick", "--quiet", *options(small)]) == 0
    printed, err = capfd.readouterr()
    assert err == ""
    for text in ("PASSED", "Steps 7 to 12", "the same 40 tokens", "quick/quickstart.png", "of 8 allowed"):
        assert text in printed
    figures = json.loads((out / "quickstart.json").read_text())
    assert figures["passed"] is True and figures["texts_equal"] is True
    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.iterdir()} == {"mlx", "torch", "quickstart.png", "quickstart.json", ".lock"}
    # the report agrees with the runs
    mlx, torch = losses(out / "mlx"), losses(out / "torch")
    assert mlx[:6] == torch[:6]
    assert figures["largest_gap"] == np.abs(np.subtract(mlx, torch)).max() < 1e-5
    assert figures["final_loss"] == {"mlx": mlx[-1], "torch": torch[-1]}
    for line in (f"{mlx[-1]:.6f}", f"{torch[-1]:.6f}", f"{figures['largest_gap']:.2e}"):
        assert line in printed
    assert [path.name for path in checkpoint.list_checkpoints(out / "mlx")] == ["step-00000006", "step-00000012"]
    assert [checkpoint.find(out / name).state["backend"] for name in ("mlx", "torch")] == ["mlx", "torch"]
    assert same_bits(state(out / "torch", 6), state(out / "mlx", 6))
    # the command that it suggests works
    assert main(["generate", "quick/mlx", "--prompt", "import "]) == 0
    assert capfd.readouterr().out.startswith("import ")


def test_again_and_with_few_checkpoints_kept(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    no_plots: None,
) -> None:
    """The results of an earlier quickstart are replaced, even of an interrupted one; other files are kept.

    A plot that cannot be drawn costs no result.
    """
    out = tmp_path / "quick"
    small += ["training.max_steps=4", "training.eval_every=2", "generation.max_new_tokens=8"]
    with monkeypatch.context() as broken:
        broken.setattr("icenet.core.report.plots.plot_parity", lambda *_, **__: "a".index("no\nfont"))
        first = quickstart.run(out, small, quiet=True)
    first.render()
    printed = capfd.readouterr().out
    assert "PASSED" in printed and "no plot: substring not found\n" in printed
    (out / "mine.txt").write_text("notes")
    (out / ".reference-killed").mkdir()
    (out / "quickstart.json").write_text("{}")  # as after an interruption
    kept = ["training.keep_checkpoints=1", "training.checkpoint_every=1"]
    second = quickstart.run(out, [*small, *kept], quiet=True)
    assert first.passed and second.passed
    assert first.final_loss == second.final_loss and first.texts.text == second.texts.text
    assert {path.name for path in out.iterdir()} == {
        "mlx", "torch", "quickstart.png", "quickstart.json", "mine.txt", ".lock"
    }  # fmt: skip


def test_a_folder_with_other_files_is_rejected(small: list[str], tmp_path: Path) -> None:
    (tmp_path / "theirs" / "mlx").mkdir(parents=True)
    (tmp_path / "theirs" / "mlx" / "thesis.txt").write_text("years of work")
    before = tree(tmp_path / "theirs")
    with pytest.raises(UsageError) as caught:
        quickstart.run(tmp_path / "theirs", small, quiet=True)
    assert is_one_line(caught.value, "theirs", "other files", "--out")
    assert tree(tmp_path / "theirs") == before


def test_a_difference_is_found(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    no_plots: None,
) -> None:  # fmt: skip
    """With a learning rate that is 1% higher on MLX in one step, the verdict and the exit code report a failure."""
    from icenet.engine.engine import Engine

    step = Engine.train_step

    def other(self: Engine, batch: object, number: int, rate: float, *rest: float) -> object:
        return step(self, batch, number, rate * 1.01 if number == 8 else rate, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "train_step", other)
    assert main(["quickstart", "--out", "quick", "--quiet", *options(small)]) == 1
    assert "DIFFERS" in capfd.readouterr().out
    figures = json.loads((tmp_path / "quick" / "quickstart.json").read_text())
    assert figures["passed"] is False and figures["worst_ratio"] > 8 and figures["worst_step"] >= 10


@pytest.mark.slow
def test_in_full(tmp_path: Path) -> None:
    import time

    began = time.monotonic()
    result = icenet("quickstart", folder=tmp_path)
    assert "PASSED" in result.stdout and "one seed: the same 300 tokens" in result.stdout
    assert time.monotonic() - began < 120
    figures = json.loads((tmp_path / "runs" / "quickstart" / "quickstart.json").read_text())
    assert figures["passed"] and figures["final_loss"]["mlx"] < 2.5
