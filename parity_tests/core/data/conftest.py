"""Fixtures of the tests of text."""

from __future__ import annotations

from pathlib import Path

import pytest

from icenet.core.data.text import prepare, reading


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks and batches, and a journal after each batch."""
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(prepare, "BATCH_BYTES", 1 << 14)
    monkeypatch.setattr(prepare, "SAVE_SECONDS", 0.0)
