"""Tokenizers by name: `bytes`, or a Hugging Face tokenizer.json."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path

from icenet.core.errors import DataError
from icenet.core.files import nearby
from icenet.core.tokenizers.base import FILE, Tokenizer
from icenet.core.tokenizers.bytes import ByteTokenizer


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: 'bytes', a tokenizer.json, or a folder with one.

    Raises:
        DataError: there is none of this name, or its file is no tokenizer.
    """
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    path = Path(name).expanduser()
    try:
        if name.strip() and path.is_dir():
            path /= FILE
        there = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, ~ of an unknown user
        there = False
    if there:
        from icenet.core.tokenizers.huggingface import HFTokenizer

        return HFTokenizer.from_file(path)
    if path.suffix == ".json" or os.sep in name or "/" in name:
        raise DataError(f"data.tokenizer: {path}: no such file{nearby(path)}")
    close = difflib.get_close_matches(name, [ByteTokenizer.name], 1)
    hint = f"did you mean {close[0]!r}?" if close else "give 'bytes' or the path of a tokenizer.json"
    raise DataError(f"data.tokenizer: no tokenizer {name!r}; {hint}")


def files_of(name: str) -> dict[str, bytes]:
    """The files of the tokenizer that `data.tokenizer` names, by name, as they are; none where there are none."""
    path = Path(name).expanduser()
    path = path / FILE if path.is_dir() else path
    return {FILE: path.read_bytes()} if name != ByteTokenizer.name and path.is_file() else {}


def from_files(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer whose `files` these are."""
    if FILE not in files:
        return ByteTokenizer()
    from icenet.core.tokenizers.huggingface import HFTokenizer

    return HFTokenizer(files[FILE])
