"""Tokenizers by name: `bytes`, or the file of a Hugging Face tokenizer."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from icenet.core.errors import DataError
from icenet.core.files import path_hint
from icenet.core.tokenizers import llama, sentencepiece, wordpiece
from icenet.core.tokenizers.base import TOKENIZER_FILE, Tokenizer
from icenet.core.tokenizers.bytes import ByteTokenizer
from icenet.core.tokenizers.companions import parse, read_files


def get_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer that `data.tokenizer` names: `bytes`, a tokenizer.json, or a folder that contains one.

    In place of a tokenizer.json there may be a vocab.txt of BERT, or a file of SentencePiece such as tokenizer.model.

    Raises:
        DataError: It does not exist, or its file is not a valid tokenizer.
    """
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    path = Path(name).expanduser()
    try:
        if name.strip() and path.is_dir():
            path = find_file(path) or path / TOKENIZER_FILE
        exists = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL character, ~ of an unknown user
        exists = False
    if exists:
        return read_tokenizer(path)
    if path.suffix == ".json" or os.sep in name or "/" in name:
        raise DataError(f"data.tokenizer: {path}: no such file{path_hint(path)}")
    close = difflib.get_close_matches(name, [ByteTokenizer.name], 1)
    hint = f"did you mean {close[0]!r}?" if close else "give 'bytes' or the path of a tokenizer.json"
    raise DataError(f"data.tokenizer: no tokenizer {name!r}; {hint}")


def read_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer from its file. The format of the file selects the class.

    Raises:
        DataError: The file cannot be read, or is not a valid tokenizer.
    """
    from icenet.core.tokenizers.huggingface import HFTokenizer

    if path.name == wordpiece.VOCABULARY:
        return HFTokenizer.from_vocabulary(path)
    if path.suffix == ".model":
        return HFTokenizer.from_sentencepiece(path)
    return HFTokenizer.from_file(path)


def find_file(folder: Path) -> Path | None:
    """Returns the file of the tokenizer in a folder.

    That is tokenizer.json, a vocab.txt with the tokens of BERT, or a file of SentencePiece.
    """
    if (folder / TOKENIZER_FILE).is_file():
        return folder / TOKENIZER_FILE
    vocabulary = folder / wordpiece.VOCABULARY
    try:
        is_bert = vocabulary.is_file() and b"[CLS]" in vocabulary.read_bytes()
    except OSError:
        is_bert = False
    if is_bert:
        return vocabulary
    return next((folder / name for name in sentencepiece.NAMES if (folder / name).is_file()), None)


def tokenizer_files(name: str) -> dict[str, bytes]:
    """Returns the content of the files of the tokenizer that `data.tokenizer` names, by file name, unchecked."""
    path = Path(name).expanduser()
    path = find_file(path) or path / TOKENIZER_FILE if path.is_dir() else path
    if name == ByteTokenizer.name or not path.is_file():
        return {}
    if path.name == wordpiece.VOCABULARY or path.suffix == ".model":
        return dict(read_tokenizer(path).files)
    companions = read_files(path.parent)
    content = llama.with_rules(path.read_bytes(), parse(companions, str(path)), path.parent)
    return {TOKENIZER_FILE: content, **companions}
