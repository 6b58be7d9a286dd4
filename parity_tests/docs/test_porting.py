"""The file, the commands and the program of the page about ports run as printed."""

from __future__ import annotations

import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import code

from icenet.cli.main import main

pytest.importorskip("mlx")
torch: Any = pytest.importorskip("torch")

PAGE = "docs/porting.md"


def test_the_page(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module, program, _ = code(PAGE, "python")
    (here / "tagger.py").write_text(module)
    monkeypatch.syspath_prepend(str(here))
    lines = code(PAGE, "bash")[0].splitlines()
    assert len(lines) == 2
    assert main(shlex.split(lines[0])[1:]) == 0
    runpy.run_path(shlex.split(lines[1])[1], run_name="__main__")
    assert "(2, 12, 5)" in capsys.readouterr().out
    scope: dict[str, Any] = {}
    exec(program, scope)
    assert scope["logits"].shape == (3, 20, 5)
    source = scope["port"].source
    for line in (
        "self.layers = [nn.Linear(24, 24) for _ in range(3)]",
        "h = h + nn.relu(",
        "for layer in self.layers:",
    ):
        assert line in source, source
    import icenet

    moved = scope["Tagger"]()
    icenet.to_torch(scope["port"].module, moved)
    for (path, ours), theirs in zip(moved.named_parameters(), scope["theirs"].parameters(), strict=True):
        assert torch.equal(ours, theirs), path
    del sys.modules["tagger"]


def test_training(here: Path, no_plots: None) -> None:
    """A run of the page's module changes backend."""
    from helpers import metrics

    (here / "mnist.py").write_text(code(PAGE, "python")[2])
    (here / "mnist.yaml").write_text(code(PAGE, "yaml")[0])
    commands = code(PAGE, "bash")[1].splitlines()
    assert len(commands) == 3
    for command in commands:
        assert main([*shlex.split(command)[1:], *(["--device", "cpu"] if "train" in command else [])]) == 0
    found = [record["loss"] for record in metrics(here / "runs/mnist") if "loss" in record]
    assert len(found) >= 2 and found[-1] < found[0]
