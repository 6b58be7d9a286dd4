"""How text becomes tokens and tokens become text."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import DataError

FILE = "tokenizer.json"
"""The name under which a tokenizer's file goes with a checkpoint or a saved model."""


class Tokenizer(Protocol):
    """What data and generation need of a tokenizer."""

    name: str
    """Names the tokenizer and its vocabulary: two with one name give the same tokens."""
    vocab_size: int
    """One more than the largest token."""
    eot_id: int
    """The token that ends a text."""
    files: Mapping[str, bytes]
    """What makes the tokenizer anew elsewhere (`from_files`), by file name; empty where nothing is needed."""
    bytes_per_second: float
    """About how much text one process can read; decides whether more are worth their start."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def continuation(self, ids: Iterable[int]) -> str:
        """The text of ids that go on from a text before them: a space between the two is kept."""
        ...

    def begins(self, data: bytes, at: int) -> int | None:
        """The first place from `at` on where a token of `data`, UTF-8, begins; None where it is not UTF-8."""
        ...

    def encode_part(self, data: bytes, first: int, last: int) -> NDArray[np.integer]:
        """The tokens of `data[first:last]` as they are in the midst of `data`, UTF-8 cut between characters.

        Raises:
            UnicodeDecodeError: it is not UTF-8.
        """
        ...


class ByteTokenizer:
    """UTF-8 bytes: ids 0 to 255 are the bytes, 256 ends a text. Any text comes back as it was."""

    name = "bytes"
    vocab_size = 257
    eot_id = 256
    files: Mapping[str, bytes] = {}
    bytes_per_second = 2e8

    def encode(self, text: str) -> list[int]:
        """The bytes of a text, as ids.

        Raises:
            DataError: a lone surrogate, which UTF-8 cannot hold.
        """
        return list(utf8(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. End of text is left out.

        Bytes that are no UTF-8 become U+FFFD, and so do ids above 256: a model may have a larger vocabulary.
        """
        values = np.fromiter(ids, dtype=np.int64)
        values = np.where((values < 0) | (values > self.eot_id), 0xFF, values)  # a byte that UTF-8 never has
        return bytes(values[values != self.eot_id].tolist()).decode("utf-8", errors="replace")

    continuation = decode

    def begins(self, data: bytes, at: int) -> int | None:
        """Every byte is a token."""
        return at

    def encode_part(self, data: bytes, first: int, last: int) -> NDArray[np.integer]:
        """The bytes, uint8 `[last - first]`."""
        part = data[first:last]
        part.decode("utf-8")  # raises where it is no text
        return np.frombuffer(part, np.uint8)


def utf8(text: str) -> bytes:
    """A text's bytes; bytes of the command line that are no UTF-8 arrive escaped, and go on as they were.

    Raises:
        DataError: a lone surrogate, which UTF-8 cannot hold.
    """
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError as error:
        raise DataError(f"the text has a lone surrogate at {error.start}, no character") from None


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
        from icenet.core.data.hf_tokenizer import HFTokenizer

        return HFTokenizer.from_file(path)
    if path.suffix == ".json" or os.sep in name or "/" in name:
        from icenet.core.data.sources import nearby

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
    from icenet.core.data.hf_tokenizer import HFTokenizer

    return HFTokenizer(files[FILE])


def text_after(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """`tokenizer.continuation`, or `decode` of a tokenizer of the user's own that has none."""
    continuation = getattr(tokenizer, "continuation", tokenizer.decode)
    text: str = continuation(ids)
    return text
