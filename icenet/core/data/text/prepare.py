"""Creates the token file of a source. An interrupted run can be resumed.

The documents are encoded in order and their tokens appended to a partial file. A journal, replaced atomically every
few seconds, records how far the file is valid: after a kill the file is truncated to it and the work continues, with
the same result. At the end the blocks (text files, ranges of JSON lines) are copied to the token file in shuffled
order. So the validation part, the tail of the file, is a fair sample of the source.

The journal is written by hand because the libraries that tokenize whole data sets (`datasets`) start an interrupted
pass again and keep their own file format. The threads are those of the tokenizer's own batch call.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core import files, rng
from icenet.core.data.text.left_out import NO_TOKEN, LeftOut
from icenet.core.data.text.reading import Chunk, Reader, UnusableFileError
from icenet.core.data.text.sources import Document, Source
from icenet.core.data.text.token_file import PIECE_TOKENS, token_dtype, write_file
from icenet.core.errors import DataError
from icenet.core.messages import option
from icenet.core.tokenizers.base import NoTokenError, Tokenizer

BATCH_BYTES = 1 << 20
"""Approximate size of the text that one call of the tokenizer encodes."""
SAVE_SECONDS = 2.0
"""Time between two updates of the journal; a kill loses at most this much work."""

Progress = Callable[[int, int], None]
"""Receives the bytes of the source that are done and its size in bytes."""


@dataclass
class Position:
    """The valid part of the partial file, and where reading continues.

    Attributes:
        document: Index of the current document; the ones before it are complete.
        offset: Where reading continues in the current document.
        tokens, blocks: Numbers of tokens and blocks in the partial file.
        first_token, first_block: Their values where the current document begins.
        lines: Number of complete documents of JSON lines.
    """

    document: int = 0
    offset: int = 0
    tokens: int = 0
    blocks: int = 0
    first_token: int = 0
    first_block: int = 0
    lines: int = 0


def make_token_file(
    path: Path,
    source: Source,
    tokenizer: Tokenizer,
    text_key: str,
    folder: Path,
    progress: Progress | None = None,
    errors: str = "stop",
) -> None:
    """Encodes a source and writes its token file, complete or not at all.

    Args:
        path: The token file.
        source: The documents.
        tokenizer: Encodes their text.
        text_key: Key of the text in JSON lines.
        folder: Keeps unfinished work for the next call; removed at the end.
        progress: Called after each batch.
        errors: The value of `data.errors`: stop, skip or replace.

    Raises:
        DataError: The source has no text, or a document cannot be read.
        OSError, FileError: A file cannot be written, for example because the disk is full.
    """
    with PartialTokens(folder, source, tokenizer, errors) as partial:
        _encode(partial, source, tokenizer, text_key, errors, progress or (lambda done, total: None))
        if not partial.position.tokens:
            count = len(source.documents)
            looked_at = f"{count} file{'s' if count != 1 else ''} looked at"
            found = source.left_out.merged(partial.left_out).summary()
            problem = f"{option('data.source')}: there is no text in {source.description} ({looked_at})"
            raise DataError(f"{problem}; {found}" if found else problem)
        partial.save()
        with files.staged(path) as stage, stage.open(path) as file:
            write_file(file, partial.shuffled_blocks(), tokenizer, partial.left_out, partial.position.lines > 0)
    shutil.rmtree(folder, ignore_errors=True)


def _encode(
    partial: PartialTokens, source: Source, tokenizer: Tokenizer, text_key: str, errors: str, progress: Progress
) -> None:
    """Encodes the documents from the current position on. Batches reach across documents."""
    first, start = partial.position.document, partial.position.offset
    done = sum(document.size for document in source.documents[:first])
    total = sum(document.size for document in source.documents)
    batch: list[tuple[Document, Chunk]] = []
    batch_bytes, saved = 0, time.monotonic()

    def encode_batch(bytes_read: int) -> None:
        nonlocal batch_bytes, saved
        tokens = iter(_tokens_of([entry for entry in batch if entry[1].text], tokenizer, errors))
        for document, chunk in batch:
            ids, removed = next(tokens) if chunk.text else (None, {})
            partial.append(chunk, ids)
            for character, count in removed.items():
                partial.left_out.add(NO_TOKEN, f"{character!r} in {document.name}", count)
        batch.clear()
        batch_bytes = 0
        if partial.resumable and time.monotonic() - saved >= SAVE_SECONDS:
            partial.save()
            saved = time.monotonic()
        progress(bytes_read, total)

    for document in source.documents[first:]:
        try:
            with Reader(document) as reader:
                for chunk in reader.chunks(start, text_key, errors):
                    batch.append((document, chunk))
                    batch_bytes += len(chunk.text)
                    if batch_bytes >= BATCH_BYTES:
                        encode_batch(done + reader.bytes_read)
        except NoTokenError:
            partial.discard_document(None)
            raise
        except DataError as error:
            encode_batch(done)  # the chunks that were read before the error
            try:
                if not isinstance(error, UnusableFileError):
                    raise
                error.leave_out(source.sole, errors)
            except DataError:
                partial.discard_document(None)
                raise
            partial.discard_document((error.reason, f"{document.name}: {error.details}", 1))
        start = 0
        done += document.size
    encode_batch(done)


def _tokens_of(
    batch: list[tuple[Document, Chunk]], tokenizer: Tokenizer, errors: str
) -> list[tuple[NDArray[Any], dict[str, int]]]:
    """Returns the tokens of each chunk, and the characters without a token that are left out of it.

    Raises:
        NoTokenError: There is no token for a part of a chunk, and `errors` is not skip.
    """
    texts, continues = [chunk.text for _, chunk in batch], [chunk.continues for _, chunk in batch]
    removed: list[dict[str, int]] = [{} for _ in batch]
    try:
        return list(zip(tokenizer.encode_batch(texts, continues), removed, strict=True))
    except NoTokenError as error:
        if errors != "skip" or not hasattr(tokenizer, "without_unknown"):
            document, chunk = batch[error.index]
            place = _place(document, chunk, error.position)
            raise NoTokenError(
                f"{option('data.source')}: {document.path}, {place}: the tokenizer has no token for "
                f"{error.part[:20]!r}; add an unknown token (unk_token) to it, remove this part of the text, or "
                f"leave out such characters with {option('data.errors=skip')}",
                error.part,
                error.position,
            ) from None
    for index, text in enumerate(texts):
        texts[index], removed[index] = tokenizer.without_unknown(text)
    return list(zip(tokenizer.encode_batch(texts, continues), removed, strict=True))


def _place(document: Document, chunk: Chunk, position: int) -> str:
    """Returns the line of a character of a chunk, and in a text file its offset."""
    with Reader(document) as reader:
        line = reader.line_number(chunk.start)
    if chunk.in_line:
        return f"line {line}"
    before = chunk.text[:position]
    return f"line {line + before.count(chr(10))}, byte {chunk.start + len(before.encode())}"


class PartialTokens:
    """The tokens of a source in the order of its documents, with a journal. Use it as a context manager.

    The folder has three files: `tokens`; `blocks`, the offset of each block's first token (uint64); and
    `journal.json`. The journal has the `Position` up to which the other two are valid, what is left out up to there,
    and a hash of the documents up to there. So work on unchanged documents is reused if later ones have changed.

    Attributes:
        position: Where the next chunk is appended.
        left_out: What is left out of the documents up to the position.
        resumable: Whether reading can resume at `position`: not in the middle of a JSON line.
    """

    def __init__(self, folder: Path, source: Source, tokenizer: Tokenizer, errors: str = "stop") -> None:
        """Opens the folder, or creates it, and truncates the files to the journal.

        Work that left out what is an error with the given value of `data.errors` is not used.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.resumable = True
        self._documents = source.documents
        self._dtype = token_dtype(tokenizer)
        self._eot = np.array([tokenizer.eot_id])
        self._hash, self._hashed = hashlib.sha256(), 0
        self.left_out, self._left_out_before = LeftOut(), LeftOut()
        self.position = self._read_journal(errors)
        self._saved_blocks = self.position.blocks
        self._tokens = open(folder / "tokens", "ab")  # noqa: SIM115 - closed by __exit__
        self._blocks = open(folder / "blocks", "ab")  # noqa: SIM115
        self._truncate()
        begins = self._block_starts()
        self._block_start = int(begins[-1]) if len(begins) else 0
        self._needs_eot = False

    def __enter__(self) -> PartialTokens:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in (self._tokens, self._blocks):
            with contextlib.suppress(OSError):  # a full disk: only what the journal describes counts
                file.close()
        if not (self.folder / "journal.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def append(self, chunk: Chunk, tokens: NDArray[np.integer] | None) -> None:
        """Appends the tokens of a chunk, after an end-of-text token if another text is before it in its block."""
        position = self.position
        if chunk.left_out is not None:
            self.left_out.add(*chunk.left_out)
        while position.blocks - position.first_block <= chunk.block:
            self._block_start = position.tokens
            self._blocks.write(np.array([position.tokens], "<u8").tobytes())
            position.blocks += 1
        if not chunk.continues:
            self._needs_eot = position.tokens > self._block_start
        if tokens is not None and len(tokens):
            if self._needs_eot:
                self._write(self._eot)
                self._needs_eot = False
            self._write(tokens)
        self.resumable = chunk.last or chunk.end is not None
        if chunk.last:
            position.document, position.offset = position.document + 1, 0
            position.first_token, position.first_block = position.tokens, position.blocks
            position.lines += chunk.in_line
            self._left_out_before = self.left_out.copy()
        elif chunk.end is not None:
            position.offset = chunk.end

    def _write(self, tokens: NDArray[np.integer]) -> None:
        self._tokens.write(tokens.astype(self._dtype).tobytes())
        self.position.tokens += len(tokens)

    def discard_document(self, left_out: tuple[str, str, int] | None) -> None:
        """Removes the tokens of the current document.

        Args:
            left_out: The reason, name and number if work continues after the document (see `LeftOut.add`).
        """
        position = self.position
        saved = self._saved_blocks > position.first_block
        position.offset, position.tokens, position.blocks = 0, position.first_token, position.first_block
        self.left_out = self._left_out_before.copy()
        self.resumable = True
        if saved:  # first, because the journal must not describe more than the files contain
            self.save()
        self._truncate()
        if left_out is not None:
            self.append(Chunk("", False, 0, None, last=True, left_out=left_out), None)
        if saved or left_out is None:
            self.save()

    def save(self) -> None:
        """Flushes the files to the disk and replaces the journal. Removes it if there is nothing to keep."""
        self._saved_blocks = self.position.blocks
        if self.position == Position():
            (self.folder / "journal.json").unlink(missing_ok=True)
            return
        for file in (self._tokens, self._blocks):
            file.flush()
            os.fsync(file.fileno())
        journal = {
            "documents": self._documents_hash(),
            "position": asdict(self.position),
            "left_out": self.left_out.as_dict(),
            "left_out_before": self._left_out_before.as_dict(),
        }
        files.write_text(self.folder / "journal.json", json.dumps(journal))

    def shuffled_blocks(self) -> Iterator[NDArray[np.integer]]:
        """Yields the tokens of all blocks, separated by end of text. Their order depends on their number alone."""
        self._tokens.flush()
        self._blocks.flush()
        tokens = np.memmap(self.folder / "tokens", self._dtype, "r", shape=(self.position.tokens,))
        edges = np.append(self._block_starts(), self.position.tokens).astype(np.int64)
        begun = False
        for index in rng.permutation(rng.key(0, "documents"), len(edges) - 1):
            start, end = int(edges[index]), int(edges[index + 1])
            if start == end:
                continue
            if begun:
                yield self._eot
            for first in range(start, end, PIECE_TOKENS):
                yield tokens[first : min(end, first + PIECE_TOKENS)]
            begun = True

    def _block_starts(self) -> NDArray[np.uint64]:
        return np.fromfile(self.folder / "blocks", "<u8", self.position.blocks)

    def _truncate(self) -> None:
        self._tokens.truncate(self.position.tokens * self._dtype.itemsize)
        self._blocks.truncate(self.position.blocks * 8)

    def _read_journal(self, errors: str) -> Position:
        """Returns the position in the journal, or the beginning if there is no journal that fits the files."""
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, IndexError):
            journal = json.loads((self.folder / "journal.json").read_text())
            position = self.position = Position(**journal["position"])
            left_out, before = (LeftOut(journal[key]) for key in ("left_out", "left_out_before"))
            needed = {"tokens": position.tokens * self._dtype.itemsize, "blocks": position.blocks * 8}
            complete = all((self.folder / name).stat().st_size >= size for name, size in needed.items())
            usable = complete and left_out.is_allowed(errors)
            if usable and journal["documents"] == self._documents_hash():
                self.left_out, self._left_out_before = left_out, before
                return position
        self._hash, self._hashed = hashlib.sha256(), 0
        return Position()

    def _documents_hash(self) -> str:
        """Returns a hash of the names, sizes and times of the documents up to the position."""
        for document in self._documents[self._hashed : self.position.document]:
            self._hash.update(document.state)
        self._hashed = self.position.document
        state = self._hash.copy()
        if self.position.offset:
            state.update(self._documents[self.position.document].state)
        return state.hexdigest()
