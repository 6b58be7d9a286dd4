"""`icenet quickstart`: what it proves, what it leaves, and what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import icenet, losses, same_bits, state, tree, write_text

from icenet.cli.main import main
from icenet.commands import quickstart
from icenet.core.errors import UsageError
from icenet.core.training import checkpoint

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
    monkeypatch.setenv("ICENET_CACHE", str(tmp_path / "cache"))
    return [*SMALL, f"data.source={write_text(tmp_path / 'text.txt')}"]


def test_a_small_one(small: list[str], tmp_path: Path) -> None:
    out = tmp_path / "quick"
    options = [part for override in small for part in ("--set", override)]
    result = icenet("quickstart", "--out", "quick", "--quiet", *options, folder=tmp_path)
    assert result.stderr == ""
    for text in (
        "PASSED",
        "The same run, steps 7 to 12, on each backend",
        "Both backends, one seed: the same 40 tokens",
        "quick/quickstart.png",
        "of 8 allowed",
    ):
        assert text in result.stdout
    figures = json.loads((out / "quickstart.json").read_text())
    assert figures["passed"] is True and figures["texts_equal"] is True
    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.iterdir()} == {"mlx", "torch", "quickstart.png", "quickstart.json"}
    # the runs are what the report says of them
    mlx, torch = losses(out / "mlx"), losses(out / "torch")
    assert mlx[:6] == torch[:6]
    assert figures["largest_gap"] == np.abs(np.subtract(mlx, torch)).max() < 1e-5
    assert figures["final_loss"] == {"mlx": mlx[-1], "torch": torch[-1]}
    for line in (f"{mlx[-1]:.6f}", f"{torch[-1]:.6f}", f"{figures['largest_gap']:.2e}"):
        assert line in result.stdout
    assert [path.name for path in checkpoint.list_checkpoints(out / "mlx")] == ["step-00000006", "step-00000012"]
    assert [checkpoint.find(out / name).state["backend"] for name in ("mlx", "torch")] == ["mlx", "torch"]
    assert same_bits(state(out / "torch", 6), state(out / "mlx", 6))
    # and it can be generated from, as its last line says
    assert icenet("generate", "quick/mlx", "--prompt", "import ", folder=tmp_path).stdout.startswith("import ")


def test_again_and_with_few_checkpoints_kept(small: list[str], tmp_path: Path) -> None:
    """Its own results are replaced, whatever was interrupted; other files in the folder stay."""
    out = tmp_path / "quick"
    first = quickstart.run(out, small, quiet=True)
    (out / "mine.txt").write_text("notes")
    (out / ".reference-killed").mkdir()
    (out / "quickstart.json").write_text("{}")  # as an interrupted one leaves it
    kept = ["training.keep_checkpoints=1", "training.checkpoint_every=1"]
    second = quickstart.run(out, [*small, *kept], quiet=True)
    assert first.passed and second.passed
    assert first.final_loss == second.final_loss and first.texts.text == second.texts.text
    assert {path.name for path in out.iterdir()} == {
        "mlx", "torch", "quickstart.png", "quickstart.json", "mine.txt"
    }  # fmt: skip


def test_a_folder_of_others_is_refused(small: list[str], tmp_path: Path) -> None:
    (tmp_path / "theirs" / "mlx").mkdir(parents=True)
    (tmp_path / "theirs" / "mlx" / "thesis.txt").write_text("years of work")
    before = tree(tmp_path / "theirs")
    with pytest.raises(UsageError, match="theirs: holds other files; give --out an empty folder"):
        quickstart.run(tmp_path / "theirs", small, quiet=True)
    assert tree(tmp_path / "theirs") == before


def test_it_can_fail(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """MLX with a learning rate that is 1% off in one step: the verdict is not green, and the exit code says so."""
    from icenet.engine.engine import Engine

    step = Engine.train_step

    def other(self: Engine, batch: object, number: int, rate: float, *rest: float) -> object:
        return step(self, batch, number, rate * 1.01 if number == 8 else rate, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "train_step", other)
    options = [part for override in small for part in ("--set", override)]
    assert main(["quickstart", "--out", str(tmp_path / "quick"), "--quiet", *options]) == 1
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
