"""The making of a token file: shards by one process or several, and then all of them in one file."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from icenet.core import rng
from icenet.core.data.text import workers as processes
from icenet.core.data.text.reading import not_text
from icenet.core.data.text.shards import SUFFIX, Maker, Shard, Task, load, plan
from icenet.core.data.text.sources import Source
from icenet.core.data.text.token_file import Writer, dtype_of, open_file
from icenet.core.errors import DataError
from icenet.core.tokenizers.base import Tokenizer

_WORTH_SECONDS = 8.0
"""Work for one process that makes the start of others worth while."""
_COPY_BYTES = 1 << 22

Progress = Callable[[int, int], None]
"""Told how many bytes of the source are done, and how many there are."""


class _Chain:
    """One file, or several small ones, and the shards that are there of it."""

    def __init__(self, documents: tuple[int, ...], tasks: Iterator[Task]) -> None:
        self.documents = documents
        self.tasks = tasks
        self.kind = ""
        self.shards: dict[int, Shard] = {}
        self.over = False
        """Nothing of it is missing, whatever tasks there are."""
        self.done = 0


@dataclass(frozen=True)
class _Part:
    """Tokens in a shard's file."""

    path: Path
    at: int
    count: int


class Build:
    """The making of one token file. What is done stays in the folder `shards`, also for the next attempt."""

    def __init__(
        self, source: Source, tokenizer: Tokenizer, text_key: str, shards: Path, path: Path, progress: Progress | None
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.text_key = text_key
        self.folder = shards
        self.path = path
        self.dtype = dtype_of(tokenizer)
        self.progress = progress or (lambda done, total: None)
        self.total = sum(document.size for document in source.documents)
        self.done = 0
        self.chains = [_Chain(documents, tasks) for documents, tasks in plan(source.documents)]
        self._work = self._all_tasks()

    def run(self, workers: int | None) -> None:
        """Makes the shards that are missing, and of all the file.

        It takes `workers` processes; with None as many as are worth their start.

        Raises:
            DataError: there is no text, or it cannot be read.
            OSError: the disk is full, or may not be written to.
        """
        if workers is None:
            worth = self.total / self.tokenizer.bytes_per_second > _WORTH_SECONDS
            workers = min(processes.processors(), processes.MOST) if worth else 1
        maker = Maker(self.folder, self.tokenizer, self.text_key, self.dtype)
        try:
            processes.run(maker, self._take, self._give, workers)
            wrong = [shard for chain in self.chains for shard in chain.shards.values() if shard.problems]
            if wrong and self.source.sole:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise not_text(self.source.documents[0], next(iter(wrong[0].problems.values())))
        finally:
            maker.close()
        self._write()

    # ---- the work, called by one thread at a time --------------------------------------------------------

    def _take(self) -> tuple[tuple[_Chain, int], Task] | None:
        return next(self._work, None)

    def _all_tasks(self) -> Iterator[tuple[tuple[_Chain, int], Task]]:
        for chain in self.chains:
            for index, task in enumerate(chain.tasks):
                if chain.over:
                    break
                chain.kind = task.kind
                there = load(self.folder / f"{task.key(self.tokenizer, self.text_key)}{SUFFIX}", verify=True)
                if there is None:
                    self.progress(self.done, self.total)
                    yield (chain, index), task
                else:
                    self._note((chain, index), there)

    def _give(self, name: tuple[_Chain, int], path: Path) -> None:
        shard = load(path)
        if shard is None:
            raise _unsound(path)
        self._note(name, shard)
        self.progress(self.done, self.total)

    def _note(self, name: tuple[_Chain, int], shard: Shard) -> None:
        chain, index = name
        chain.shards[index] = shard
        document = self.source.documents[chain.documents[0]]
        if document.packed or (shard.problems and chain.kind == "text"):
            chain.over |= shard.last
        if chain.over:
            reached = document.size
        else:
            reached = max(chain.done, shard.done) if document.packed else chain.done + shard.done
        self.done += reached - chain.done
        chain.done = reached

    # ---- the file ----------------------------------------------------------------------------------------

    def _blocks(self) -> list[list[_Part]]:
        """What is put in another order: texts, and blocks of lines; empty in place of what is no text."""
        by_document: list[list[list[_Part]]] = [[] for _ in self.source.documents]
        for chain in self.chains:
            pieces: list[list[_Part]] = []
            for index in sorted(chain.shards):
                shard = chain.shards[index]
                at = shard.offset
                for count in shard.pieces:
                    pieces.append([_Part(shard.path, at, count)] if count else [])
                    at += count * self.dtype.itemsize
                if chain.over and shard.last:
                    break
            if chain.kind == "files":
                for document, piece in zip(chain.documents, pieces, strict=True):
                    by_document[document] = [piece]
            elif chain.kind == "lines":
                by_document[chain.documents[0]] = pieces
            else:
                wrong = any(shard.problems for shard in chain.shards.values())
                by_document[chain.documents[0]] = [[] if wrong else [part for piece in pieces for part in piece]]
        return [block for blocks in by_document for block in blocks]

    def _write(self) -> None:
        """Writes the file of all shards: complete, or not at all.

        Blocks are put in an order drawn once and for all, so that the validation part, the tail, is a fair sample of
        them. In training windows are drawn from everywhere in any case.
        """
        temporary = self.path.with_name(f"{self.path.stem}.{secrets.token_hex(4)}.tmp")
        try:
            with open(temporary, "xb") as file, tempfile.TemporaryFile(dir=self.path.parent) as starts:
                writer = Writer(file, starts, self.tokenizer)
                blocks = self._blocks()
                for index in rng.permutation(rng.key(0, "documents"), len(blocks)):
                    writer.add(tokens for part in blocks[index] for tokens in self._tokens(part))
                if writer.count == 0:
                    shutil.rmtree(self.folder, ignore_errors=True)
                    number = len(self.source.documents)
                    files = f"{number} file{'s' if number != 1 else ''}"
                    raise DataError(f"data.source: there is no text in {self.source.description} ({files} looked at)")
                writer.finish()
            try:
                os.replace(temporary, self.path)
            except PermissionError:  # Windows, where another process has mapped the same file
                if open_file(self.path, self.tokenizer) is None:
                    raise
            shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _tokens(self, part: _Part) -> Iterator[NDArray[np.integer]]:
        with open(part.path, "rb") as shard:
            shard.seek(part.at)
            left = part.count * self.dtype.itemsize
            while left:
                data = shard.read(min(left, _COPY_BYTES))
                if not data:
                    raise _unsound(part.path)
                yield np.frombuffer(data, self.dtype)
                left -= len(data)


def _unsound(shard: Path) -> DataError:
    return DataError(f"the shard {shard} is not what was written there; is the disk sound?")
