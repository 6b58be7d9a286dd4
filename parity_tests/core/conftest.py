"""Fixtures of the tests of `icenet.core`."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import source_code


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the tokenizer.json of a byte-level BPE of 400 tokens that `icenet prepare` trained."""
    pytest.importorskip("tokenizers.models")
    from icenet.commands.prepare import train_tokenizer

    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.txt").write_text(source_code(60_000), encoding="utf-8")
    train_tokenizer(str(folder / "text.txt"), vocab_size=400, out=folder / "tokenizer.json", quiet=True)
    return folder / "tokenizer.json"
