"""Reads the text of documents as a stream of chunks, so that no file has to fit in memory.

A document is a text file or a file of JSON lines, plain or gzipped. Chunk boundaries are a pure function of the
document's bytes: the tokens do not depend on the number of threads, nor on where an interrupted run resumed.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from icenet.core.config.section import nearest
from icenet.core.data.text.sources import Document, reason
from icenet.core.errors import DataError

CHUNK_BYTES = 1 << 16
"""Maximum size of a chunk. A tokenizer needs some hundred bytes of memory per byte of text."""
MAX_LINE_BYTES = 1 << 28
"""Maximum length of a JSON line. A line has to fit in memory."""

_BUFFER_BYTES = 1 << 20
_WINDOW_BYTES = 1 << 12
_MIN_BLOCK, _MAX_BLOCK, _BLOCK_FRACTION = 64, 1 << 20, 1024

_CHUNK_ENDS = [re.compile(end) for end in (rb"\S(?= \S)", rb"[0-9A-Za-z](?=\r?\n)", rb"\S(?=\s)")]
"""Preferred ends of a chunk, best first: before a single space, before a line end that follows a letter or digit, and
before other white space. Common tokenizers begin a token at the first, so chunks have the tokens of the whole text.
T5's does not at a line end: it splits at spaces only, and a line end is a part of a word."""


class NotTextError(DataError):
    """A file that is not UTF-8 text."""


@dataclass(frozen=True)
class Chunk:
    """A part of one text.

    Attributes:
        text: Its characters. Empty for the last chunk of a document, which only marks the end.
        continues: Whether it continues the text of the previous chunk.
        block: Index of its block within the document. Blocks are the units that are shuffled: one for a text file,
            ranges of lines for JSON lines.
        end: Offset in the (unpacked) document from which reading can resume after this chunk. None inside a line.
        last: Whether the document ends here.
    """

    text: str
    continues: bool
    block: int
    end: int | None
    last: bool = False


class Reader:
    """Reads the chunks of one document. Use it as a context manager."""

    def __init__(self, document: Document) -> None:
        """Opens a document. Raises DataError if it cannot be read."""
        self.document = document
        try:
            self._file = open(document.path, "rb", buffering=0)  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise self._unreadable(error) from None
        raw = gzip.GzipFile(fileobj=self._file, mode="rb") if document.packed else self._file
        self._stream = io.BufferedReader(raw, _BUFFER_BYTES)  # type: ignore[arg-type]

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    @property
    def bytes_read(self) -> int:
        """Bytes of the file itself that have been read, for a progress bar."""
        return self._file.tell()

    def chunks(self, start: int = 0, text_key: str = "text") -> Iterator[Chunk]:
        """Yields the chunks from offset `start` on; the last one is empty and has `last` set.

        Args:
            start: 0, or the `end` of a chunk.
            text_key: Key of the text in each JSON line.

        Raises:
            NotTextError: A text file is not UTF-8, or contains NUL bytes.
            DataError: The file cannot be read, has changed since it was listed, or has an invalid JSON line.
        """
        self._check()
        self._call(self._stream.seek, start)
        chunks = self._json_chunks(start, text_key) if self.document.lines else self._text_chunks(start)
        last_block = yield from chunks
        self._check()
        yield Chunk("", False, last_block, None, last=True)

    def _text_chunks(self, start: int) -> Generator[Chunk, None, int]:
        for data in split(lambda size: self._call(self._stream.read, size)):
            try:
                if (nul := data.find(0)) >= 0:
                    raise UnicodeDecodeError("utf-8", data, nul, nul + 1, "NUL byte")
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise NotTextError(
                    f"data.source: {self.document.path} is not UTF-8 text ({error.reason} at byte "
                    f"{start + error.start}); unpack it or convert it to UTF-8 first"
                ) from None
            yield Chunk(text, start > 0, 0, start + len(data))
            start += len(data)
        return 0

    def _json_chunks(self, start: int, text_key: str) -> Generator[Chunk, None, int]:
        edges = block_edges()
        block, next_edge = -1, next(edges)
        while line := self._call(self._stream.readline, MAX_LINE_BYTES + 1):
            while next_edge <= start:
                block, next_edge = block + 1, next(edges)
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"data.source: {self.document.path} has a line of more than {MAX_LINE_BYTES >> 20} MB: is it "
                    "JSON lines, an object on each line?"
                )
            end = start + len(line)
            try:
                data = _text_of_line(line.removeprefix(b"\xef\xbb\xbf") if start == 0 else line, text_key)
            except DataError as error:
                number = self._line_number(start)
                raise DataError(f"data.source: {self.document.path}, line {number}: {error}") from None
            parts = list(split(io.BytesIO(data).read))
            for index, part in enumerate(parts):
                yield Chunk(part.decode("utf-8"), index > 0, block, end if index == len(parts) - 1 else None)
            start = end
        while next_edge < start:  # blocks that contain no line
            block, next_edge = block + 1, next(edges)
        return block

    def _line_number(self, offset: int) -> int:
        with Reader(self.document) as again:
            data = iter(lambda: again._stream.read(min(_BUFFER_BYTES, offset - again._stream.tell())), b"")
            return 1 + sum(part.count(b"\n") for part in data)

    def _check(self) -> None:
        status = os.fstat(self._file.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.document.size, self.document.mtime_ns):
            raise DataError(f"{self.document.path} changed while it was read; try again when no process writes to it")

    def _call(self, function: Callable[[int], Any], argument: int) -> Any:
        """Calls a method of the stream; its errors become a DataError that names the file."""
        try:
            return function(argument)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            what = "ends too early" if isinstance(error, EOFError) else f"is damaged ({reason(error)})"
            raise DataError(
                f"data.source: {self.document.path} {what}: not a complete gzip file; pack it again"
            ) from None
        except OSError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: OSError) -> DataError:
        return DataError(f"cannot read {self.document.path}: {reason(error)}")


def split(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Splits a stream of UTF-8 into chunks of at most `CHUNK_BYTES`: between words, else at line ends, or in words.

    Args:
        read: Returns that many bytes, fewer only at the end.
    """
    data = b""
    while True:
        data += read(CHUNK_BYTES - len(data))
        if len(data) < CHUNK_BYTES:
            if data:
                yield data
            return
        end = _boundary(data)
        yield data[:end]
        data = data[end:]


def _boundary(data: bytes) -> int:
    """Returns the last good place to end a chunk, above 0."""
    window = max(0, len(data) - _WINDOW_BYTES)
    for pattern in _CHUNK_ENDS:
        if ends := [match.end() for match in pattern.finditer(data, window)]:
            return ends[-1]
    for end in range(len(data) - 1, max(0, len(data) - 4), -1):
        if data[end] & 0xC0 != 0x80:  # the first byte of a character
            return end
    return len(data)


def block_edges() -> Iterator[int]:
    """Yields the offsets at which blocks of JSON lines begin, without end.

    Each block is 1/1024 of the bytes before it, at least 64 bytes and at most 1 MB: a file of any size has many.
    """
    edge = 0
    while True:
        yield edge
        edge += min(_MAX_BLOCK, max(_MIN_BLOCK, edge // _BLOCK_FRACTION))


def _text_of_line(line: bytes, key: str) -> bytes:
    """Returns the text under a key of a JSON object, as UTF-8; empty for a blank line.

    Raises:
        DataError: The reason, without the file and the line number.
    """
    if not line.strip():
        return b""
    try:
        value = json.loads(line.rstrip(b"\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        raise DataError(f"not JSON that can be read ({'nested too deeply' if deep else error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{_kind(value)} instead of an object like {{{json.dumps(key)}: ...}}")
    if key not in value:
        raise DataError(f"no key {key!r} (data.text_key){nearest(key, list(map(str, value))[:20])}")
    if not isinstance(value[key], str):
        raise DataError(f"{key!r} (data.text_key) is {_kind(value[key])}, not a string")
    try:
        return value[key].encode("utf-8")  # type: ignore[no-any-return]
    except UnicodeEncodeError:
        raise DataError(f"the text of {key!r} has a lone surrogate, which is not a character") from None


def _kind(value: object) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
