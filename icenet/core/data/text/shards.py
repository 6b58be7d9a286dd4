"""The work of making tokens, cut into shards of bounded size.

A shard is a part of a file, or some small files together. Its tokens lie in a file of their own until all are there,
so that a kill loses no more than the shards in hand. Which shards there are, and what is in each, depends on the
files and the tokenizer alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.data.text.reading import SEGMENT_BYTES, Reader, json_texts, segment_tokens, text_tokens
from icenet.core.data.text.sources import Document
from icenet.core.tokenizers.base import Tokenizer

SHARD_BYTES = 1 << 22
"""Text in one shard, about."""
_MOST_FILES = 1000
_LEAST_BLOCK, _MOST_BLOCK, _BLOCK_SHARE = 64, 1 << 20, 1024
SUFFIX = ".shard"


@dataclass(frozen=True)
class Task:
    """One shard's work. `kind` says what the range counts.

    files: none; all of some small files. text: segments of a text. lines: bytes, those of the lines that begin there.
    """

    kind: str
    documents: tuple[Document, ...]
    first: int = 0
    last: int = 0

    def key(self, tokenizer: Tokenizer, text_key: str) -> str:
        """The name of the shard: a hash of all that its tokens depend on."""
        state = hashlib.sha256(f"{self.kind}\n{self.first}\n{self.last}\n{tokenizer.name}\n{text_key}\n".encode())
        for document in self.documents:
            state.update(os.fsencode(f"{document.path}\0{document.size}\0{document.mtime_ns}\n"))
        return state.hexdigest()[:24]

    def size(self) -> int:
        """Bytes of the files that it reads; of a packed file not known, and 0."""
        if self.kind == "files":
            return sum(document.size for document in self.documents)
        if self.documents[0].packed:
            return 0
        unit = SEGMENT_BYTES if self.kind == "text" else 1
        return max(0, min(self.documents[0].size, self.last * unit) - self.first * unit)

    def to_json(self) -> dict[str, Any]:
        documents = [[d.name, str(d.path), d.size, d.mtime_ns] for d in self.documents]
        return {"kind": self.kind, "first": self.first, "last": self.last, "documents": documents}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Task:
        documents = tuple(Document(name, Path(path), size, time) for name, path, size, time in value["documents"])
        return cls(value["kind"], documents, value["first"], value["last"])


@dataclass(frozen=True)
class Shard:
    """What came of a task: a file of tokens, and how many of them each of its pieces has.

    A piece is a file (files), all there is (text) or a block of lines (lines).
    """

    path: Path
    offset: int
    """Where in the file the tokens begin."""
    pieces: list[int]
    problems: dict[int, str]
    """Why a piece is no text."""
    last: bool
    """Nothing of the file comes after it."""
    done: int
    """Bytes read of the files; of a packed one those up to here."""


def line_edges(first: int, last: int) -> Iterator[int]:
    """Where the blocks of a file of lines begin, from `first`, itself one of them, up to and with `last`.

    They are what is put in another order. Each is at most 1/1024 of what is before it, so that a file of any size is
    many; and at most a megabyte, and at least 64 bytes.
    """
    edge = first
    while edge < last:
        yield edge
        edge += min(_MOST_BLOCK, max(_LEAST_BLOCK, edge // _BLOCK_SHARE))
    yield min(edge, last)


def tasks_of(document: Document) -> Iterator[Task]:
    """The tasks of one file; for a packed file without end, since its size is known when it has been read."""
    if document.lines:
        first, end = 0, (1 << 62 if document.packed else max(1, document.size))
        for edge in line_edges(0, end):
            if edge - first >= SHARD_BYTES or (edge >= end and edge > first):
                yield Task("lines", (document,), first, edge)
                first = edge
        return
    step = SHARD_BYTES // SEGMENT_BYTES
    segments = None if document.packed else -(-document.size // SEGMENT_BYTES)
    for first in itertools.count(0, step):
        if segments is not None and first >= max(1, segments):
            return
        yield Task("text", (document,), first, first + step)


def plan(documents: Sequence[Document]) -> Iterator[tuple[tuple[int, ...], Iterator[Task]]]:
    """The tasks of all files: which files, by their index, and what makes their tokens, in order."""
    small: list[int] = []
    held = 0
    for index, document in enumerate(documents):
        if document.lines or document.packed or document.size > SEGMENT_BYTES:
            yield (index,), tasks_of(document)
            continue
        small.append(index)
        held += document.size
        if held >= SHARD_BYTES or len(small) == _MOST_FILES:
            yield tuple(small), iter([Task("files", tuple(documents[i] for i in small))])
            small, held = [], 0
    if small:
        yield tuple(small), iter([Task("files", tuple(documents[i] for i in small))])


# ---- doing it ---------------------------------------------------------------------------------------------


class Maker:
    """Makes shards, one after the other, in this process. A packed file stays open from one to the next."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, text_key: str, dtype: np.dtype[Any]) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.text_key = text_key
        self.dtype = dtype
        self._open: Reader | None = None

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def make(self, task: Task) -> Path:
        """Writes the shard of a task, complete or not at all; gives its file.

        Raises:
            DataError: a file cannot be read, or holds what it should not.
            OSError: the shard cannot be written.
        """
        pieces: list[list[NDArray[np.integer]]] = []
        problems: dict[int, str] = {}
        last, done = True, task.size()
        if task.kind == "files":
            for index, document in enumerate(task.documents):
                with Reader(document) as reader:
                    pieces.append(self._segments(reader, range(1), index, problems))
        else:
            reader = self._reader(task.documents[0])
            if task.kind == "text":
                pieces.append(self._segments(reader, range(task.first, task.last), 0, problems))
                last = bool(problems) or not reader.read(task.last * SEGMENT_BYTES, task.last * SEGMENT_BYTES + 1)
            else:
                pieces = self._blocks(reader, task)
                last = not reader.read(task.last, task.last + 1)
                if last:  # no blocks beyond the end: packed and as it is, a file is the same ones
                    pieces = pieces[: sum(edge < reader.end for edge in line_edges(task.first, task.last))]
            reader.check()
            done = reader.done if task.documents[0].packed else done
        header = {
            "pieces": [sum(map(len, piece)) for piece in pieces],
            "problems": problems,
            "last": last,
            "done": done,
        }
        data = [tokens.astype(self.dtype).tobytes() for piece in pieces for tokens in piece]
        return _write(self.folder / f"{task.key(self.tokenizer, self.text_key)}{SUFFIX}", header, data)

    def _reader(self, document: Document) -> Reader:
        if self._open is None or self._open.document != document:
            self.close()
            self._open = Reader(document)
        return self._open

    def _segments(
        self, reader: Reader, segments: range, piece: int, problems: dict[int, str]
    ) -> list[NDArray[np.integer]]:
        found = []
        try:
            for index in segments:
                tokens = segment_tokens(reader.read, self.tokenizer, index)
                if tokens is None:
                    break
                found.append(tokens)
        except UnicodeDecodeError as error:
            problems[piece] = error.reason
            return []
        return found

    def _blocks(self, reader: Reader, task: Task) -> list[list[NDArray[np.integer]]]:
        """The tokens of each block; texts of one block have an end of text between them."""
        edges = list(line_edges(task.first, task.last))
        blocks: list[list[NDArray[np.integer]]] = [[] for _ in edges[1:]]
        end = np.array([self.tokenizer.eot_id])
        index = 0
        for position, text in json_texts(reader, task.first, task.last, self.text_key):
            while position >= edges[index + 1]:
                index += 1
            tokens = [part for part in text_tokens(text, self.tokenizer) if len(part)]
            if tokens:
                blocks[index] += ([end] if blocks[index] else []) + tokens
        return blocks


def _write(path: Path, header: dict[str, Any], data: list[bytes]) -> Path:
    crc = 0
    for part in data:
        crc = zlib.crc32(part, crc)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(json.dumps({**header, "bytes": sum(map(len, data)), "crc32": crc}).encode() + b"\n")
            file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def load(path: Path, verify: bool = False) -> Shard | None:
    """The shard in a file; None where there is none, or (with `verify`, which reads it all) where it is damaged."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline())
            offset = file.tell()
            if os.fstat(file.fileno()).st_size != offset + header["bytes"]:
                return None
            crc = 0
            while verify and (data := file.read(1 << 20)):
                crc = zlib.crc32(data, crc)
            if verify and crc != header["crc32"]:
                return None
            problems = {int(piece): str(why) for piece, why in header["problems"].items()}
            return Shard(path, offset, header["pieces"], problems, header["last"], header["done"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
