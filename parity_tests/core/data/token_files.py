"""Makes token files of sources, and reads them, for the tests of text."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from helpers import is_one_line

from icenet.core.data.text.cache import load_tokens
from icenet.core.data.text.sources import find_source
from icenet.core.data.text.token_file import TokenFile
from icenet.core.errors import DataError
from icenet.core.tokenizers.bytes import ByteTokenizer


def make(source: Path | str, cache: Path, tokenizer: Any = None, **options: Any) -> TokenFile:
    found = find_source(str(source), options.get("errors", "stop"))
    return load_tokens(found, tokenizer or ByteTokenizer(), cache, **options)


def text_of(source: Path | str, cache: Path) -> str:
    """Returns the tokens of a source of one document, as text."""
    return bytes(make(source, cache).tokens.tolist()).decode()


def fingerprint_of(file: TokenFile) -> str:
    """Returns the fingerprint of a file's bytes as documented: SHA-256 of the tokenizer's name and the tokens."""
    return hashlib.sha256(b"bytes\n" + file.tokens.astype("<u2").tobytes()).hexdigest()


def left_over(cache: Path) -> list[str]:
    """Returns the names in the cache besides lock files, which stay."""
    return sorted(path.name for path in cache.glob("*") if path.suffix != ".lock")


def fails(source: Path | str, cache: Path, *names: str, **options: Any) -> None:
    """Requires an error of one line with these names."""
    with pytest.raises(DataError) as caught:
        make(source, cache, **options)
    assert is_one_line(caught.value, *names) and caught.value.exit_code == 2, caught.value


def write_lines(path: Path, texts: list[str], key: str = "text") -> Path:
    data = "".join(json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts))
    path.write_bytes(gzip.compress(data.encode()) if path.suffix.lower() == ".gz" else data.encode())
    return path


def some_texts(number: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{i}: " + "wörter " * draw.randrange(1, 60) for i in range(number)]
