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
from icenet.core.data.text.left_out import (
    BAD_LINES,
    BINARY,
    DAMAGED,
    EMPTY,
    EMPTY_LINES,
    JSON_ARRAYS,
    NOT_UTF8,
    REPLACED,
    UNREADABLE,
)
from icenet.core.data.text.sources import Document, reason
from icenet.core.errors import DataError
from icenet.core.files import LFS_POINTER, LFS_REMEDY
from icenet.core.messages import option

CHUNK_BYTES = 1 << 16
"""Maximum size of a chunk. A tokenizer needs some hundred bytes of memory per byte of text."""
MAX_LINE_BYTES = 1 << 28
"""Maximum length of a JSON line. A line has to fit in memory."""

BOM = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8. It is not a part of the text."""
OTHER_BOMS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}

_BUFFER_BYTES = 1 << 20
_HEAD_BYTES = 8000  # where git looks for a NUL
_LFS_BYTES = 1024  # no pointer of Git LFS is as large, by its specification
_JSON_HEAD_BYTES = 1 << 22
_WINDOW_BYTES = 1 << 12
_MIN_BLOCK, _MAX_BLOCK, _BLOCK_FRACTION = 64, 1 << 20, 1024

_CHUNK_ENDS = [re.compile(end) for end in (rb"\S(?= \S)", rb"[0-9A-Za-z](?=\r?\n)", rb"\S(?=\s)")]
"""Preferred ends of a chunk, best first: before a single space, before a line end that follows a letter or digit, and
before other white space. Common tokenizers begin a token at the first, so chunks have the tokens of the whole text.
T5's does not at a line end: it splits at spaces only, and a line end is a part of a word."""


class UnusableFileError(DataError):
    """A file without text that can be read.

    Attributes:
        reason: See `left_out`.
        details: What is wrong, without the path.
    """

    def __init__(self, path: object, reason: str, details: str, way_out: str = "") -> None:
        self.reason, self.details = reason, details
        problem = f"{option('data.source')}: {path} {details}"
        super().__init__("; ".join(part for part in (problem, way_out) if part))

    def leave_out(self, sole: bool, errors: str) -> None:
        """Checks that a source may leave the file out.

        Args:
            sole: Whether the file is the whole source. It must be text then.
            errors: The value of `data.errors`. Binary files are left out without it.

        Raises:
            DataError: It may not.
        """
        if sole:
            raise self
        if self.reason != BINARY and errors != "skip":
            raise DataError(f"{self}; {option('data.errors=skip')} leaves out such files") from None


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
        start: Offset in the (unpacked) document where this chunk, or its line, begins.
        in_line: Whether the document contains JSON lines.
        left_out: What is missing in the text: the reason (see `left_out`), where, and a number; or None.
    """

    text: str
    continues: bool
    block: int
    end: int | None
    last: bool = False
    start: int = 0
    in_line: bool = False
    left_out: tuple[str, str, int] | None = None


class Reader:
    """Reads the chunks of one document. Use it as a context manager."""

    def __init__(self, document: Document) -> None:
        """Opens a document. Raises UnusableFileError if it cannot be read."""
        self.document = document
        self._has_chunks = False
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

    def chunks(self, start: int = 0, text_key: str = "text", errors: str = "stop") -> Iterator[Chunk]:
        """Yields the chunks from offset `start` on; the last one is empty and has `last` set.

        Args:
            start: 0, or the `end` of a chunk.
            text_key: Key of the text in each JSON line.
            errors: stop; skip leaves out invalid JSON lines; replace replaces invalid bytes by U+FFFD.

        Raises:
            UnusableFileError: The file is binary, is not UTF-8, is damaged, or cannot be read.
            DataError: The file has changed since it was listed, or has an invalid JSON line.
        """
        self._check()
        if self.document.way_out is not None:
            suffix = "".join(self.document.path.suffixes[-1:])
            raise self._unusable(BINARY, f"is {suffix}, not text", self.document.way_out)
        self._check_encoding()
        lines = self.is_lines(text_key)
        self._call(self._stream.seek, start)
        found = self._json_chunks(start, text_key, errors) if lines else self._text_chunks(start, errors)
        last_block = yield from found
        self._check()
        empty = start == 0 and not self._has_chunks
        left_out = (EMPTY, self.document.name, 1) if empty else None
        yield Chunk("", False, last_block, None, last=True, in_line=lines, left_out=left_out)

    def is_lines(self, text_key: str) -> bool:
        """Returns whether the file contains JSON lines: by its name, or for .json by its first line.

        Raises:
            UnusableFileError: It is a JSON array of objects with a text. See also `chunks`.
        """
        if not self.document.json:
            return self.document.lines
        self._call(self._stream.seek, 0)
        head = self._call(self._stream.read, _JSON_HEAD_BYTES).removeprefix(BOM).decode("utf-8", "replace").lstrip()
        array = head[:1] == "["
        head = head[1:].lstrip() if array else head
        try:
            value, end = json.JSONDecoder().raw_decode(head)
        except (ValueError, RecursionError):
            return False
        if not isinstance(value, dict) or not isinstance(value.get(text_key), str):
            return False
        if array:
            raise self._unusable(
                JSON_ARRAYS, "is a JSON array, not JSON lines", f"convert it: jq -c '.[]' {self.document.path.name}"
            )
        return "\n" not in head[:end]

    def _check_encoding(self) -> None:
        """Raises UnusableFileError if the file begins like a binary file, UTF-16 or a pointer of Git LFS."""
        self._call(self._stream.seek, 0)
        if self.document.size < _LFS_BYTES:
            self._call(self._file.seek, 0)  # a pointer in place of a gzip file is not packed
            if self._call(self._file.read, len(LFS_POINTER)) == LFS_POINTER:
                why = BINARY if self.document.binary else DAMAGED
                raise self._unusable(why, "is a Git LFS pointer, not the file", LFS_REMEDY)
            self._call(self._file.seek, 0)
        head = self._call(self._stream.read, _HEAD_BYTES)
        encoding = next((name for bom, name in OTHER_BOMS.items() if head.startswith(bom)), None)
        if encoding is not None and not self.document.binary:
            raise self._unusable(
                NOT_UTF8,
                f"is not UTF-8 text but {encoding}, by its byte order mark",
                f"convert it to UTF-8, as iconv -f {encoding} -t UTF-8 does",
            )
        if (nul := head.find(0)) >= 0 and not self.document.lines:
            details = f"is not UTF-8 text (NUL byte at byte {nul})"
            raise self._unusable(BINARY, details, "unpack it or convert it to UTF-8 first")

    def _text_chunks(self, start: int, errors: str) -> Generator[Chunk, None, int]:
        continues = start > 0
        if start == 0 and self._call(self._stream.read, len(BOM)) == BOM:
            start = len(BOM)
        self._call(self._stream.seek, start)
        for data in split(lambda size: self._call(self._stream.read, size)):
            text, left_out = self._decode(data, start, errors)
            end = start + len(data)
            yield self._chunk(text, continues, 0, end, start=start, left_out=left_out)
            start, continues = end, True
        return 0

    def _decode(self, data: bytes, start: int, errors: str) -> tuple[str, tuple[str, str, int] | None]:
        """Returns the text of bytes at an offset, and what is replaced in it."""
        try:
            if (nul := data.find(0)) >= 0:
                raise UnicodeDecodeError("utf-8", data, nul, nul + 1, "NUL byte")
            return data.decode("utf-8"), None
        except UnicodeDecodeError as error:
            place = start + error.start
            if self.document.binary:
                raise self._unusable(BINARY, f"is not UTF-8 text ({error.reason} at byte {place})") from None
            if errors == "replace":
                text = data.decode("utf-8", "replace").replace("\0", "\ufffd")
                count = text.count("\ufffd") - data.count("\ufffd".encode())
                return text, (REPLACED, f"{self.document.name} from byte {place}", count)
            raise self._unusable(
                NOT_UTF8,
                f"is not UTF-8 text ({error.reason} at byte {place})",
                f"convert it to UTF-8 first, or replace such bytes by U+FFFD with {option('data.errors=replace')}",
            ) from None

    def _json_chunks(self, start: int, text_key: str, errors: str) -> Generator[Chunk, None, int]:
        edges = block_edges()
        block, next_edge = -1, next(edges)
        number = 1 if start == 0 else None
        while line := self._call(self._stream.readline, MAX_LINE_BYTES + 1):
            while next_edge <= start:
                block, next_edge = block + 1, next(edges)
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{option('data.source')}: {self.document.path} has a line of more than {MAX_LINE_BYTES >> 20} "
                    "MB: is it JSON lines, an object on each line?"
                )
            end = start + len(line)
            data: bytes | None = None
            left_out = None
            try:
                data, replaced = _text_of_line(line.removeprefix(BOM) if start == 0 else line, text_key, errors)
                if data == b"":
                    left_out = (EMPTY_LINES, "", 1)
                elif replaced:
                    left_out = (REPLACED, "", replaced)
            except DataError as error:
                if errors != "skip":
                    raise DataError(
                        f"{option('data.source')}: {self.document.path}, line {self.line_number(start)}: {error}; "
                        f"correct it, or leave such lines out with {option('data.errors=skip')}"
                    ) from None
                left_out = (BAD_LINES, f": {error}", 1)
            if left_out is not None:
                number = number or self.line_number(start)
                left_out = (left_out[0], f"{self.document.name} line {number}{left_out[1]}", left_out[2])
            parts = list(split(io.BytesIO(data or b"").read))
            if not parts and left_out:
                yield self._chunk("", False, block, end, start=start, in_line=True, left_out=left_out)
            for index, part in enumerate(parts):
                last = index == len(parts) - 1
                yield self._chunk(
                    part.decode("utf-8"),
                    index > 0,
                    block,
                    end if last else None,
                    start=start,
                    in_line=True,
                    left_out=left_out if last else None,
                )
            start = end
            number = number and number + 1
        while next_edge < start:  # blocks that contain no line
            block, next_edge = block + 1, next(edges)
        return block

    def _chunk(self, text: str, continues: bool, block: int, end: int | None, **more: Any) -> Chunk:
        self._has_chunks = True
        return Chunk(text, continues, block, end, **more)

    def line_number(self, offset: int) -> int:
        """Returns the number of the line at an offset, from 1 on."""
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
            raise self._unusable(DAMAGED, f"{what}: not a complete gzip file", "pack it again") from None
        except OSError as error:
            raise self._unreadable(error) from None

    def _unusable(self, why: str, details: str, way_out: str = "") -> UnusableFileError:
        return UnusableFileError(self.document.path, why, details, way_out)

    def _unreadable(self, error: OSError) -> UnusableFileError:
        return self._unusable(UNREADABLE, f"cannot be read: {reason(error)}")


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


def _text_of_line(line: bytes, key: str, errors: str = "stop") -> tuple[bytes | None, int]:
    """Returns the text under a key of a JSON object, as UTF-8, and the number of characters that are replaced.

    Args:
        line: The line.
        key: The key.
        errors: replace replaces invalid bytes and lone surrogates by U+FFFD.

    Returns:
        None instead of the text for a blank line.

    Raises:
        DataError: The reason, without the file and the line number.
    """
    if not line.strip():
        return None, 0
    content = line.rstrip(b"\n")
    try:
        text = content.decode("utf-8", "replace" if errors == "replace" else "strict")
        value = json.loads(text)
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
        raise DataError(f"no key {key!r} ({option('data.text_key')}){nearest(key, list(map(str, value))[:20])}")
    if not isinstance(value[key], str):
        raise DataError(f"{key!r} ({option('data.text_key')}) is {_kind(value[key])}, not a string")
    replaced = text.count("\ufffd") - content.count("\ufffd".encode())
    try:
        return value[key].encode("utf-8"), replaced
    except UnicodeEncodeError:
        if errors != "replace":
            raise DataError(f"the text of {key!r} has a lone surrogate, which is not a character") from None
        surrogates = re.compile("[\ud800-\udfff]")
        found, count = surrogates.subn("\ufffd", value[key])
        return found.encode("utf-8"), replaced + count


def _kind(value: object) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
