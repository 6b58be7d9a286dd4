"""Files of text read in parts, so that no file has to fit in memory and several processes can share one.

Where a part begins is a pure function of the file's bytes near there, whoever reads it: its tokens are the same
whether one process reads all of a file or many read a part each.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from icenet.core.config.section import nearest
from icenet.core.data.text.sources import CHUNK_BYTES, Document, reason
from icenet.core.errors import DataError
from icenet.core.tokenizers.base import Tokenizer

SEGMENT_BYTES = 1 << 17
"""Text that is made tokens in one piece; they take hundreds of bytes a byte meanwhile.

A longer text is cut near the multiples of it.
"""
_CONTEXT_BYTES = 1 << 10
_ROOM_BYTES = 1 << 12
_MOST_TRIED = 8
MAX_LINE_BYTES = 1 << 28
"""The longest line of JSON; it has to fit in memory."""
_KEPT_BYTES = 1 << 21

_AFTER_LINE = re.compile(rb"[!-~\x80-\xff]\r?\n(?=[!-~\xc2-\xf4])")
_BEFORE_SPACE = re.compile(rb"[!-~\x80-\xff](?= [!-~\xc2-\xf4])")
_CHARACTER = re.compile(rb"[^\x80-\xbf]")

Read = Callable[[int, int], bytes]
"""The bytes from one position to another; fewer where there are no more."""


class Reader:
    """The bytes of a file, or of what was packed in it, at any position.

    In a packed file the way back is long: all but the last two megabytes are unpacked anew.
    """

    def __init__(self, document: Document) -> None:
        """Opens a file.

        Raises:
            DataError: it cannot be read, or is not what it was when it was listed.
        """
        self.document = document
        try:
            self._file: BinaryIO = open(document.path, "rb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise self._unreadable(error) from None
        try:
            self.check()
        except DataError:
            self.close()
            raise
        self._packed: gzip.GzipFile | None = None
        self._position, self._kept = 0, b""

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def check(self) -> None:
        """Raises DataError where the file has changed since it was listed."""
        status = os.fstat(self._file.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.document.size, self.document.mtime_ns):
            raise DataError(f"{self.document.path} changed while it was read; try again when nothing writes to it")

    @property
    def done(self) -> int:
        """Bytes of the file itself that lie before the last position."""
        return self._file.tell()

    @property
    def end(self) -> int:
        """The length of what is read, where all of it has been."""
        return self._position if self.document.packed else self.document.size

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`, or to the end."""
        try:
            if not self.document.packed:
                self._file.seek(start)
                return self._file.read(max(0, min(stop, self.document.size) - start))
            return self._read_packed(start, stop)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            what = "ends too early" if isinstance(error, EOFError) else f"is damaged ({reason(error)})"
            raise DataError(f"data.source: {self.document.path} {what}: no whole gzip file; pack it again") from None
        except OSError as error:
            raise self._unreadable(error) from None

    def _read_packed(self, start: int, stop: int) -> bytes:
        if self._packed is None or start < self._position - len(self._kept):
            self._file.seek(0)
            self._packed = gzip.GzipFile(fileobj=self._file, mode="rb")
            self._position, self._kept = 0, b""
        while self._position < stop:
            data = self._packed.read(CHUNK_BYTES)
            if not data:
                break
            self._position += len(data)
            kept = self._kept + data
            self._kept = kept[max(0, len(kept) - max(_KEPT_BYTES, self._position - start)) :]
        first = self._position - len(self._kept)
        return self._kept[max(0, start - first) : max(0, stop - first)]

    def _unreadable(self, error: OSError) -> DataError:
        return DataError(f"cannot read {self.document.path}: {reason(error)}")


# ---- text -------------------------------------------------------------------------------------------------


def segment_tokens(read: Read, tokenizer: Tokenizer, index: int) -> NDArray[np.integer] | None:
    """The tokens of one segment of a text, counted from 0; None where the text has ended before it.

    Raises:
        UnicodeDecodeError: it is not UTF-8 text, or has NUL bytes.
    """
    start, stop = (_cut(read, number * SEGMENT_BYTES, tokenizer) for number in (index, index + 1))
    first = max(0, start - _CONTEXT_BYTES)
    data = read(first, stop + _CONTEXT_BYTES)
    before, end = start - first, min(stop - first, len(data))
    if end <= before:
        return None
    after = len(data) - end
    if (nul := data.find(0, before, end)) >= 0:
        raise UnicodeDecodeError("utf-8", data, nul, nul + 1, "NUL byte")
    skip, whole = _whole_characters(data, before if first else 0, after)
    return tokenizer.encode_part(data[skip:whole], before - skip, end - skip)


def _cut(read: Read, at: int, tokenizer: Tokenizer | None) -> int:
    """A place at `at` or a little after where a token begins: if it can be at a line, else at a word, else anywhere.

    Where the tokenizer begins one is told from the text nearby. Beyond the end of the text it is `at`.
    """
    if at == 0:
        return 0
    first = max(0, at - _CONTEXT_BYTES)
    data = read(first, at + _ROOM_BYTES)
    near = at - first
    if len(data) <= near:
        return at
    for pattern in (_AFTER_LINE, _BEFORE_SPACE):
        for found in itertools.islice(pattern.finditer(data, near - 1), _MOST_TRIED):
            if _begins(data, found.end(), tokenizer) == found.end():
                return first + found.end()
    character = _CHARACTER.search(data, near)
    if character is None:
        return at
    return first + (_begins(data, character.start(), tokenizer) or character.start())


def _begins(data: bytes, at: int, tokenizer: Tokenizer | None) -> int | None:
    """The first place from `at` on where a token begins, told from a part of `data` around it."""
    part = data[: at + _CONTEXT_BYTES]
    skip, whole = _whole_characters(part, at, len(part) - at)
    found = at - skip if tokenizer is None else tokenizer.begins(part[skip:whole], at - skip)
    return None if found is None else skip + found


def _whole_characters(data: bytes, before: int, after: int) -> tuple[int, int]:
    """The part of UTF-8 that is whole characters, where the `before` first bytes and the `after` last may not be."""
    skip = 0
    while skip < min(3, before) and 0x80 <= data[skip] < 0xC0:
        skip += 1
    lead = next((n for n in range(1, min(3, after) + 1) if data[-n] >= 0xC0), 0)
    cut = bool(lead) and data[-lead] >= (0, 0xC0, 0xE0, 0xF0)[lead]
    return skip, len(data) - (lead if cut else 0)


def text_tokens(text: bytes, tokenizer: Tokenizer) -> Iterator[NDArray[np.integer]]:
    """The tokens of a text in memory, segment by segment."""
    if len(text) <= SEGMENT_BYTES:
        yield tokenizer.encode_part(text, 0, len(text))
        return
    for index in range(-(-len(text) // SEGMENT_BYTES)):
        tokens = segment_tokens(lambda start, stop: text[start:stop], tokenizer, index)
        if tokens is not None:
            yield tokens


# ---- JSON lines -------------------------------------------------------------------------------------------


def json_texts(reader: Reader, start: int, stop: int, key: str) -> Iterator[tuple[int, bytes]]:
    """The texts of the lines that begin from `start` to before `stop`: where each line begins, and UTF-8.

    Raises:
        DataError: a line that is too long, not JSON, no object, or has no text under `key`.
    """
    for position, line in _lines(reader, start, stop):
        if position == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")  # what some editors put before UTF-8
        if line.strip():
            try:
                text = _text_of(line, key)
            except DataError as error:
                number = 1 + sum(chunk.count(b"\n") for chunk in _chunks(reader, 0, position))
                raise DataError(f"data.source: {reader.document.path}, line {number}: {error}") from None
            yield position, text


def _text_of(line: bytes, key: str) -> bytes:
    """The text under a key of a line of JSON, as UTF-8; a DataError without where."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        raise DataError(f"not JSON that can be read ({'nested too deeply' if deep else error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{_kind(value)} where an object like {{{json.dumps(key)}: ...}} is wanted")
    if key not in value:
        raise DataError(f"no key {key!r} (data.text_key){nearest(key, list(map(str, value))[:20])}")
    if not isinstance(value[key], str):
        raise DataError(f"{key!r} (data.text_key) is {_kind(value[key])}, not a text")
    try:
        return value[key].encode("utf-8")  # type: ignore[no-any-return]
    except UnicodeEncodeError:
        raise DataError(f"the text of {key!r} has a lone surrogate, no character") from None


def _kind(value: object) -> str:
    names = {list: "a list", dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _lines(reader: Reader, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """The lines, without their ends, that begin from `start` to before `stop`."""
    position = start
    if start > 0:  # a line begins after the end of another
        found = False
        position = start - 1
        for chunk in _chunks(reader, position, stop):
            at = chunk.find(b"\n")
            position += len(chunk) if at < 0 else at + 1
            if found := at >= 0:
                break
        if not found:
            return
    pieces: list[bytes] = []  # of the line that has begun at `position`
    length = 0
    for chunk in _chunks(reader, position, None):
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            if position >= stop:
                return
            line = b"".join((*pieces, line))
            yield position, line
            position += len(line) + 1
            pieces, length = [], 0
        if position >= stop:
            return
        pieces.append(rest)
        length += len(rest)
        if length > MAX_LINE_BYTES:
            raise DataError(
                f"data.source: {reader.document.path} has a line of more than {MAX_LINE_BYTES >> 20} MB: is it JSON "
                "lines, an object on each line?"
            )
    if length and position < stop:
        yield position, b"".join(pieces)


def _chunks(reader: Reader, start: int, stop: int | None) -> Iterator[bytes]:
    while stop is None or start < stop:
        end = start + CHUNK_BYTES
        data = reader.read(start, end if stop is None else min(end, stop))
        if not data:
            return
        yield data
        start += len(data)


def texts(documents: Iterable[Document], key: str, sole: bool) -> Iterator[bytes]:
    """The text of files piece by piece, UTF-8 cut between characters; files that are no text are passed over."""
    for document in documents:
        with Reader(document) as reader:
            if document.lines:
                for _, text in json_texts(reader, 0, 1 << 62, key):
                    yield text
            else:
                yield from _pieces(reader, sole)


def _pieces(reader: Reader, sole: bool) -> Iterator[bytes]:
    step = 1 << 16
    start = index = 0
    while data := reader.read(start, stop := _cut(reader.read, (index + 1) * step, None)):
        try:
            if 0 in data:
                raise UnicodeDecodeError("utf-8", data, 0, 1, "NUL byte")
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            if sole:
                raise not_text(reader.document, error.reason) from None
            return
        yield data
        start, index = stop, index + 1


def not_text(document: Document, why: str) -> DataError:
    """The error about a file that was named, and is no text."""
    return DataError(
        f"data.source: {document.path} is not UTF-8 text ({why}); unpack it or convert it to UTF-8 first"
    )
