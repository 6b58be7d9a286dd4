"""Packed text: batches of fixed-length windows of a token file. A window can contain parts of several documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from icenet.core import rng
from icenet.core.data.epochs import Epochs, validation_rows
from icenet.core.data.text.cache import load_tokens
from icenet.core.data.text.left_out import EMPTY
from icenet.core.data.text.prepare import Progress
from icenet.core.data.text.sources import LINES, Source, find_source
from icenet.core.data.text.token_file import PIECE_TOKENS, TokenFile, compute_fingerprint
from icenet.core.errors import DataError
from icenet.core.tokenizers import get_tokenizer
from icenet.core.tokenizers.base import Tokenizer

Batch = dict[str, NDArray[Any]]
"""`inputs` and `labels`, int32 `[batch, seq_length]` each; a label is the token after its input. Padded batches also
have `attention_mask`, bool."""


class TextDataset:
    """The tokens of a text, split into a training part and a validation part (the tail).

    An epoch is one pass over the training part in windows that do not overlap, in the order of `Epochs`. Each epoch
    has its own offset of the windows, drawn from (seed, epoch) alone.

    Attributes:
        tokenizer: The tokenizer of the tokens.
        num_train_tokens, num_validation_tokens: Sizes of the two parts.
        num_documents: Number of documents; empty and left out files do not count.
        fingerprint: SHA-256, hex, of the tokenizer's name and all tokens.
        description: Name of the source in messages.
        path: The token file, if there is one.
    """

    unit = "tok"
    packing: ClassVar[bool] = True
    path: Path | None = None
    notes: Sequence[str] = ()
    summary: Sequence[str] = ()

    def __init__(
        self,
        tokens: NDArray[np.integer],
        tokenizer: Tokenizer,
        *,
        seq_length: int,
        seed: int,
        validation_fraction: float = 0.0,
        num_documents: int = 1,
        fingerprint: str = "",
        description: str = "text",
    ) -> None:
        """Splits the tokens into the two parts.

        Args:
            tokens: Integers `[num_tokens]`, an array or a memory map.
            tokenizer: Their tokenizer.
            seq_length: Number of tokens in a window.
            seed: Determines the order of batches.
            validation_fraction: Share of the tokens in the validation part, from 0 to below 1.
            num_documents, fingerprint, description: See the attributes.

        Raises:
            DataError: The validation part is shorter than one window but not empty, or an argument is out of range.
        """
        if seq_length < 1:
            raise DataError(f"data.seq_length must be at least 1, not {seq_length}")
        if not 0 <= validation_fraction < 1:
            raise DataError(f"data.validation_fraction must be from 0 to below 1, not {validation_fraction}")
        self.tokenizer = tokenizer
        self.seq_length = seq_length
        self.seed = seed
        self.num_documents = num_documents
        self.fingerprint = fingerprint
        self.description = description
        self.num_validation_tokens = int(len(tokens) * validation_fraction)
        self.num_train_tokens = len(tokens) - self.num_validation_tokens
        self._tokens = tokens
        self._train = tokens[: self.num_train_tokens]
        self._validation = tokens[self.num_train_tokens :]
        # The first window starts at the epoch's offset, at most seq_length - 1, and the last label is one token after
        # its window. This many windows fit with every offset, so all epochs have the same length.
        windows = max(0, (self.num_train_tokens - seq_length) // seq_length)
        self._epochs = Epochs(windows, seed, self._too_few_windows)
        self._check_validation(validation_fraction)

    def _check_validation(self, fraction: float) -> None:
        if fraction and self.num_validation_tokens <= self.seq_length:
            raise DataError(
                f"{self.description} leaves {self.num_validation_tokens:,} tokens for validation, "
                f"and one window needs {self.seq_length + 1:,}: name a longer data.source, "
                f"raise data.validation_fraction ({fraction:g}; 0 for no validation) "
                f"or lower data.seq_length ({self.seq_length})"
            )

    @classmethod
    def open(
        cls,
        source: str,
        *,
        seq_length: int,
        seed: int,
        tokenizer: str | Tokenizer = "bytes",
        validation_fraction: float = 0.0,
        cache_dir: str | Path | None = None,
        text_key: str = "text",
        errors: str = "stop",
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Opens a source: 'stdlib', a file, a folder or a glob.

        Args:
            source: The source, see `find_source`.
            seq_length, seed, validation_fraction: See `__init__`.
            tokenizer: A tokenizer or its name.
            cache_dir, text_key, errors, workers, progress: See `load_tokens`.

        Raises:
            DataError: The source is missing, empty, not text or too short, or the cache cannot be written.
        """
        found = find_source(source, errors)
        encoder = get_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        folder = Path(cache_dir) if cache_dir is not None else None
        file = load_tokens(
            found, encoder, folder, text_key=text_key, errors=errors, workers=workers, progress=progress
        )
        dataset = cls(
            file.tokens,
            encoder,
            seq_length=seq_length,
            seed=seed,
            validation_fraction=validation_fraction,
            num_documents=file.num_documents,
            fingerprint=file.fingerprint,
            description=found.description,
            **({} if cls.packing else {"starts": file.starts}),
        )
        dataset.path = file.path
        dataset.notes = _notes(found, file, text_key)
        return dataset

    @property
    def files(self) -> Mapping[str, bytes]:
        """The files of the tokenizer, which checkpoints store."""
        return self.tokenizer.files

    @property
    def items_per_row(self) -> int:
        """Number of tokens in one row of a batch."""
        return self.seq_length

    @property
    def facts(self) -> dict[str, Any]:
        """Empty: a text model needs nothing besides its configuration and tokenizer."""
        return {}

    def is_intact(self) -> bool:
        """Returns whether the tokens are those that were encoded. Reads all of them, about 1 s per GB."""
        pieces = (self._tokens[first : first + PIECE_TOKENS] for first in range(0, len(self._tokens), PIECE_TOKENS))
        return compute_fingerprint(pieces, self.tokenizer) == self.fingerprint

    def steps_per_epoch(self, batch_size: int) -> int:
        """Returns the number of full batches in one pass over the training part. The remainder is dropped.

        Raises:
            DataError: The number is zero.
        """
        return self._epochs.steps(batch_size)

    def train_batch(self, step: int, batch_size: int) -> Batch:
        """Returns the batch of a step, counted from 0: a pure function of (seed, step, batch_size).

        Returns:
            `inputs` and `labels`, int32 `[batch_size, seq_length]`.

        Raises:
            DataError: The training part is shorter than one batch.
        """
        epoch, windows = self._epochs.rows(step, batch_size)
        offset = int(rng.bits(rng.key(self.seed, "data offset", epoch), 1)[0]) % self.seq_length
        return self._batch(self._train, offset + windows * self.seq_length)

    def validation_batches(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """Yields batches of validation windows, the same in every call; the last one may be smaller.

        Args:
            batch_size: Rows in a batch.
            count: Maximum number of batches, whose windows are spread evenly over the validation part. None: all.
        """
        windows = max(0, (self.num_validation_tokens - 1) // self.seq_length)
        for rows in validation_rows(windows, batch_size, count):
            yield self._batch(self._validation, rows * self.seq_length)

    def _too_few_windows(self, batch_size: int) -> str:
        needed = (batch_size + 1) * self.seq_length
        return (
            f"{self.description} has {self.num_train_tokens:,} training tokens, "
            f"and one batch needs {needed:,}: name a longer data.source, "
            f"or lower data.seq_length ({self.seq_length}) or training.batch_size ({batch_size})"
        )

    def _batch(self, tokens: NDArray[np.integer], starts: NDArray[np.int64]) -> Batch:
        windows = np.empty((len(starts), self.seq_length + 1), np.int32)
        for row, start in zip(windows, starts, strict=True):
            row[:] = tokens[start : start + self.seq_length + 1]
        return {
            "inputs": np.ascontiguousarray(windows[:, :-1]),
            "labels": np.ascontiguousarray(windows[:, 1:]),
        }


def _notes(source: Source, file: TokenFile, text_key: str) -> list[str]:
    """Returns what the user should know about a source: what is left out, and a key without effect."""
    left_out = source.left_out.merged(file.left_out)
    if source.identity.startswith("stdlib "):
        left_out.remove(EMPTY)  # the library's own empty modules
    notes = [f"{source.description}: {left_out.summary()}"] if left_out else []
    if text_key != "text" and not file.has_lines:
        notes.append(
            f"data.text_key {text_key!r} has no effect: {source.description} has no JSON lines ({', '.join(LINES)}, "
            "also .gz; .json with an object on each line)"
        )
    return notes
