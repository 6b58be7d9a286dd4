"""Texts that do not share a row: each begins one of its own, filled up and masked (`data.packing: false`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from icenet.core import rng
from icenet.core.data.text.packed import Batch, TextDataset
from icenet.core.errors import DataError
from icenet.core.tokenizers.base import Tokenizer

IGNORED = -100
"""The label of a position that predicts nothing."""
_MULTIPLE = 16
"""Rows are filled up to a multiple of it, so that compiled steps see few shapes."""


class Rows:
    """The rows of a part of some tokens.

    A text of n tokens is n + 1 labels: its tokens and the end of text after them. Its inputs are the tokens before:
    the end of text that is before it, and its own. So a row is what packing would show of its text. Texts of more
    labels than `length` are cut into rows of `length` and a rest; of a text that reaches into another part, a part
    has what is its own.

    Attributes:
        count: the rows.
        num_labels: the labels in them.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        starts: NDArray[np.integer],
        first: int,
        last: int,
        length: int,
        eot_id: int,
    ) -> None:
        """The rows of `tokens[first:last]`, whose texts begin at `starts`, int `[texts]`, rising from 0."""
        self._tokens = tokens
        self._length = length
        self._eot_id = eot_id
        # the end of text after each: the last text's is not there, and is put where it would be
        ends = np.append(np.asarray(starts[1:], np.int64) - 1, len(tokens))
        begins = np.asarray(starts, np.int64)
        # a part that begins within a text begins with an input
        label_first = np.where(begins >= first, begins, first + 1)
        label_last = np.where((ends < last) | (last == len(tokens)), ends, last - 1)
        counts = label_last - label_first + 1
        # neither of another part nor empty: two ends of text in a row hold no text
        held = (ends > begins) & (begins < last) & (ends >= first) & (counts > 0)
        self._firsts, self._counts = label_first[held], counts[held]
        self._row_ends = np.cumsum(-(-self._counts // length))
        self.count = int(self._row_ends[-1]) if len(self._row_ends) else 0
        self.num_labels = int(self._counts.sum())

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """Some rows, as long as the longest of them, rounded up to a multiple of 16 but not above `length`."""
        texts = np.searchsorted(self._row_ends, rows, side="right")
        within = rows - np.where(texts > 0, self._row_ends[texts - 1], 0)
        firsts = self._firsts[texts] + within * self._length
        counts = np.minimum(self._length, self._counts[texts] - within * self._length)
        longest = min(self._length, -(-int(counts.max()) // _MULTIPLE) * _MULTIPLE)
        inputs = np.full((len(rows), longest), self._eot_id, np.int32)
        labels = np.full((len(rows), longest), IGNORED, np.int32)
        mask = np.arange(longest) < counts[:, None]
        for row, (first, count) in enumerate(zip(firsts.tolist(), counts.tolist(), strict=True)):
            skip = int(first == 0)  # before the first text is an end of text that is not there
            inputs[row, skip:count] = self._tokens[first - 1 + skip : first - 1 + count]
            # and so it is after the last
            known = min(count, len(self._tokens) - first)
            labels[row, :known] = self._tokens[first : first + known]
            labels[row, known:count] = self._eot_id
        return {"inputs": inputs, "labels": labels, "attention_mask": mask}


class DocumentDataset(TextDataset):
    """A text's documents, each in rows of its own (`Rows`), cut into a training part and a validation part.

    The parts are those of `TextDataset`. An epoch takes each training row once, in an order drawn from (seed, epoch)
    alone.
    """

    packing: ClassVar[bool] = False

    def __init__(
        self, tokens: NDArray[np.integer], tokenizer: Tokenizer, *, starts: NDArray[np.integer], **options: Any
    ) -> None:
        """Takes what `TextDataset` does, and where the documents begin, int `[documents]`.

        Raises:
            DataError: there is a validation part, but no row in it.
        """
        self._starts = starts
        super().__init__(tokens, tokenizer, **options)
        self._train_rows = Rows(tokens, starts, 0, self.num_train_tokens, self.seq_length, tokenizer.eot_id)

    def _check_validation(self, fraction: float) -> None:
        part = (self.num_train_tokens, self.num_train_tokens + self.num_validation_tokens)
        self._validation_rows = Rows(self._tokens, self._starts, *part, self.seq_length, self.tokenizer.eot_id)
        if fraction and not self._validation_rows.count:
            raise DataError(
                f"{self.description} leaves no text for validation: name a longer data.source, or raise "
                f"data.validation_fraction ({fraction:g}; 0 for no validation)"
            )

    @property
    def items_per_row(self) -> int:
        """Tokens in one row of a batch, on average."""
        return max(1, round(self._train_rows.num_labels / max(1, self._train_rows.count)))

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches in one pass over the training rows; what is left over is dropped.

        Raises:
            DataError: there is not one.
        """
        if batch_size < 1:
            raise DataError(f"training.batch_size must be at least 1, not {batch_size}")
        steps = self._train_rows.count // batch_size
        if steps == 0:
            raise DataError(
                f"{self.description} has {self._train_rows.count:,} rows to train on, and one batch needs "
                f"{batch_size:,}: name a longer data.source, or lower training.batch_size, or set data.packing=true"
            )
        return steps

    def train_batch(self, step: int, batch_size: int) -> Batch:
        """The batch of a step, counted from 0: a pure function of (seed, step, batch_size).

        Returns:
            `inputs` and `labels`, int32 `[batch_size, T]`, and `attention_mask`, bool `[batch_size, T]`, True where a
            row has a token; T is at most seq_length. Where a row has none, its label is -100.

        Raises:
            DataError: there are fewer rows than in one batch.
        """
        if step < 0:
            raise ValueError(f"steps are counted from 0, not {step}")
        epoch, index = divmod(step, self.steps_per_epoch(batch_size))
        order = self._row_order(epoch)
        return self._train_rows.batch(order[index * batch_size : (index + 1) * batch_size])

    def validation_batches(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """As `TextDataset.validation_batches`, of rows as `train_batch` has them."""
        rows = self._validation_rows.count if self.num_validation_tokens else 0
        taken = rows if count is None else min(rows, count * batch_size)
        chosen = np.arange(taken, dtype=np.int64) * rows // max(taken, 1)
        for first in range(0, taken, batch_size):
            yield self._validation_rows.batch(chosen[first : first + batch_size])

    def _row_order(self, epoch: int) -> NDArray[np.int64]:
        cached = self._epoch  # read once: another thread may prefetch
        if cached is None or cached[0] != epoch:
            cached = (epoch, 0, rng.permutation(rng.key(self.seed, "data", epoch), self._train_rows.count))
            self._epoch = cached
        return cached[2]
