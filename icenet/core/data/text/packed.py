"""Text as training batches: which tokens stand in which batch is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from icenet.core import rng
from icenet.core.data.text.cache import load_tokens
from icenet.core.data.text.prepare import Progress
from icenet.core.data.text.sources import find_source
from icenet.core.errors import DataError
from icenet.core.tokenizers import get_tokenizer
from icenet.core.tokenizers.base import Tokenizer

Batch = dict[str, NDArray[Any]]
"""`inputs` and `labels`, int32 `[batch, seq_length]` each: a label is the token after its input."""


class TextDataset:
    """A text's tokens, cut into a training part and a validation part (the tail).

    An epoch is one pass over the training part in windows that do not overlap. Each epoch cuts them at
    another offset and takes them in another order, both drawn from (seed, epoch) alone: a resumed run, the
    other backend or another process sees the same batches, and nothing needs to be stored but the step.

    Attributes:
        tokenizer: how the text became tokens.
        num_train_tokens, num_validation_tokens: the sizes of the two parts.
        num_documents: the texts in it (files that are not text, or empty, do not count).
        fingerprint: SHA-256, hex, of the tokenizer and all tokens: equal where the data is equal.
        description: the source in words.
        path: the file of the tokens, where there is one.
    """

    unit = "tok"
    packing: ClassVar[bool] = True
    path: Path | None = None

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
        """Cuts `tokens` (1-D, any integer type, a memory map or an array) in two parts.

        Raises:
            DataError: there is a validation part, but it is shorter than one window.
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
        # Windows start at the epoch's offset, at most seq_length - 1, and their last label is one further on:
        # this many fit whatever the offset, so that all epochs are of one length.
        self._windows = max(0, (self.num_train_tokens - seq_length) // seq_length)
        self._epoch: tuple[int, int, NDArray[np.int64]] | None = None
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
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Opens a source ('stdlib', a file, a folder or a glob); its tokens are made once and then mapped.

        `workers` and `progress` are those of `load_tokens`.

        Raises:
            DataError: the source is missing, empty, not text or too short, or the cache cannot be written.
        """
        found = find_source(source)
        encoder = get_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        folder = Path(cache_dir) if cache_dir is not None else None
        file = load_tokens(found, encoder, folder, text_key=text_key, workers=workers, progress=progress)
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
        return dataset

    @property
    def files(self) -> Mapping[str, bytes]:
        """What goes with a checkpoint so that using it needs no data: the tokenizer's file, if it has one."""
        return self.tokenizer.files

    @property
    def items_per_row(self) -> int:
        """Tokens in one row of a batch."""
        return self.seq_length

    @property
    def facts(self) -> dict[str, Any]:
        """Nothing: using the model needs no more than its configuration."""
        return {}

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches in one pass over the training part; what is left over is dropped.

        Raises:
            DataError: there is not one.
        """
        if batch_size < 1:
            raise DataError(f"training.batch_size must be at least 1, not {batch_size}")
        steps = self._windows // batch_size
        if steps == 0:
            needed = (batch_size + 1) * self.seq_length
            raise DataError(
                f"{self.description} has {self.num_train_tokens:,} training tokens, "
                f"and one batch needs {needed:,}: name a longer data.source, "
                f"or lower data.seq_length ({self.seq_length}) or training.batch_size ({batch_size})"
            )
        return steps

    def epoch_of(self, step: int, batch_size: int) -> int:
        """The epoch, from 0, in which a step, from 0, falls."""
        return step // self.steps_per_epoch(batch_size)

    def train_batch(self, step: int, batch_size: int) -> Batch:
        """The batch of a step, counted from 0: a pure function of (seed, step, batch_size).

        Returns:
            `inputs` and `labels`, int32 `[batch_size, seq_length]`.

        Raises:
            DataError: the training part is shorter than one batch.
        """
        if step < 0:
            raise ValueError(f"steps are counted from 0, not {step}")
        epoch, index = divmod(step, self.steps_per_epoch(batch_size))
        offset, order = self._order(epoch)
        windows = order[index * batch_size : (index + 1) * batch_size]
        return self._batch(self._train, offset + windows * self.seq_length)

    def validation_batches(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """At most `count` batches of validation windows, the same every time; the last may be smaller.

        Where there are more windows than asked for, those taken are spread evenly over the validation part.
        With a validation fraction of 0 there are none. `count=None` takes all.
        """
        windows = max(0, (self.num_validation_tokens - 1) // self.seq_length)
        taken = windows if count is None else min(windows, count * batch_size)
        starts = np.arange(taken, dtype=np.int64) * windows // max(taken, 1) * self.seq_length
        for first in range(0, taken, batch_size):
            yield self._batch(self._validation, starts[first : first + batch_size])

    def _order(self, epoch: int) -> tuple[int, NDArray[np.int64]]:
        """The offset at which an epoch cuts its windows, and the order in which it takes them."""
        cached = self._epoch  # read once: another thread may prefetch
        if cached is None or cached[0] != epoch:
            offset = int(rng.bits(rng.key(self.seed, "data offset", epoch), 1)[0]) % self.seq_length
            cached = (epoch, offset, rng.permutation(rng.key(self.seed, "data", epoch), self._windows))
            self._epoch = cached
        return cached[1], cached[2]

    def _batch(self, tokens: NDArray[np.integer], starts: NDArray[np.int64]) -> Batch:
        windows = np.empty((len(starts), self.seq_length + 1), np.int32)
        for row, start in zip(windows, starts, strict=True):
            row[:] = tokens[start : start + self.seq_length + 1]
        return {
            "inputs": np.ascontiguousarray(windows[:, :-1]),
            "labels": np.ascontiguousarray(windows[:, 1:]),
        }
