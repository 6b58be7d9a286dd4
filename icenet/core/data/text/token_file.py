"""The file that tokens are kept in: a header of 4096 bytes (JSON, padded with spaces), the tokens, little-endian, and
where each text begins, uint64 from a multiple of eight."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from icenet.core.tokenizers.base import Tokenizer

VERSION = 2
"""Of the format and of everything that decides the tokens (order of documents, what counts as text)."""
HEADER_BYTES = 4096


@dataclass(frozen=True)
class TokenFile:
    """The tokens of a source: `tokens` is a read-only memory map, uint16 (uint32 above 65,536 tokens)."""

    path: Path
    tokens: NDArray[np.unsignedinteger]
    num_documents: int
    """Texts that are not empty."""
    fingerprint: str
    """SHA-256, hex, of the tokenizer's name and a newline, and then the tokens as little-endian bytes."""
    starts: NDArray[np.unsignedinteger]
    """Where each text begins, a read-only memory map, uint64; one end of text is between it and the one before."""

    def intact(self, tokenizer: Tokenizer) -> bool:
        """Whether the tokens still have their fingerprint: reads all of them."""
        digest = _digest(tokenizer)
        for start in range(0, len(self.tokens), 1 << 20):
            digest.update(self.tokens[start : start + (1 << 20)].tobytes())
        return digest.hexdigest() == self.fingerprint


def dtype_of(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The type that a tokenizer's tokens are kept in."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _digest(tokenizer: Tokenizer) -> hashlib._Hash:
    return hashlib.sha256(f"{tokenizer.name}\n".encode())


def _starts_at(count: int, dtype: np.dtype[Any]) -> int:
    """Where in the file the beginnings of the texts stand."""
    return -(-(HEADER_BYTES + count * dtype.itemsize) // 8) * 8


def open_file(path: Path, tokenizer: Tokenizer) -> TokenFile | None:
    """The tokens in a file; None where it is not there, or is not what its header says.

    Raises:
        OSError: it cannot be read.
    """
    dtype = dtype_of(tokenizer)
    right = {"format": "icenet-tokens", "version": VERSION, "tokenizer": tokenizer.name, "dtype": dtype.str}
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(HEADER_BYTES))
            size = os.fstat(file.fileno()).st_size
            if {name: header.get(name) for name in right} != right:
                return None
            count, texts = header["tokens"], header["starts"]
            if count < 1 or texts < 1 or size != _starts_at(count, dtype) + 8 * texts:
                return None
            tokens = np.memmap(file, dtype, "r", offset=HEADER_BYTES, shape=(count,))
            starts = np.memmap(file, "<u8", "r", offset=_starts_at(count, dtype), shape=(texts,))
            return TokenFile(path, tokens, header["documents"], header["sha256"], starts)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, or JSON of another kind
        return None


class Writer:
    """Writes such a file. `starts` is a file to keep the beginnings of texts in meanwhile."""

    def __init__(self, file: BinaryIO, starts: IO[bytes], tokenizer: Tokenizer) -> None:
        self.count = 0
        """Tokens so far."""
        self._file = file
        self._starts = starts
        self._tokenizer = tokenizer
        self._dtype = dtype_of(tokenizer)
        self._digest = _digest(tokenizer)
        self._texts = self._number_of_starts = 0
        self._ended = True
        file.write(b" " * HEADER_BYTES)

    def add(self, parts: Iterable[NDArray[np.integer]]) -> None:
        """Adds tokens that come in parts, after an end of text where there are tokens before them."""
        begun = self.count == 0
        for tokens in parts:
            if len(tokens) and not begun:
                self._add(np.array([self._tokenizer.eot_id]))
            begun |= len(tokens) > 0
            self._add(tokens)

    def _add(self, tokens: NDArray[np.integer]) -> None:
        if not len(tokens):
            return
        data = tokens.astype(self._dtype).tobytes()
        self._digest.update(data)
        self._file.write(data)
        ends = tokens == self._tokenizer.eot_id
        before = np.concatenate(([self._ended], ends[:-1]))
        self._texts += int((before & ~ends).sum())
        begin = np.flatnonzero(before) + self.count
        self._starts.write(begin.astype("<u8").tobytes())
        self._number_of_starts += len(begin)
        self._ended = bool(ends[-1])
        self.count += len(tokens)

    def finish(self) -> None:
        """Writes where the texts begin, and the header, and waits until all is on the disk."""
        self._file.write(bytes(_starts_at(self.count, self._dtype) - self._file.tell()))
        self._starts.seek(0)
        shutil.copyfileobj(self._starts, self._file)
        header = {
            "format": "icenet-tokens",
            "version": VERSION,
            "tokenizer": self._tokenizer.name,
            "dtype": self._dtype.str,
            "tokens": self.count,
            "documents": self._texts,
            "starts": self._number_of_starts,
            "sha256": self._digest.hexdigest(),
        }
        self._file.seek(0)
        self._file.write(json.dumps(header).encode().ljust(HEADER_BYTES))
        self._file.flush()
        os.fsync(self._file.fileno())
