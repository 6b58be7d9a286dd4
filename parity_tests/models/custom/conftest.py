"""Fixtures of the tests of custom models."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from custom_models import IMAGES, SETTINGS, TEXT
from helpers import write_text

from icenet.core.config import custom


@pytest.fixture(autouse=True)
def distrust(no_plots: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts each test like a new process: no file is trusted."""
    monkeypatch.setattr(custom, "_trusted", set())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the working directory, with the models, a text and the configurations."""
    write_text(tmp_path / "text.txt")
    for name, text in TEXT.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(SETTINGS))
    (tmp_path / "images.yaml").write_text(yaml.safe_dump(IMAGES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path
