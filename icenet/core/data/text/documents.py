"""Unpacked text (`data.packing: false`): each document begins a new row, which is padded and masked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from icenet.core.data.epochs import Epochs, validation_rows
from icenet.core.data.text.packed import Batch, TextDataset
from icenet.core.errors import DataError
from icenet.core.tokenizers.base import Tokenizer

IGNORED = -100
"""The label of padding, which the loss ignores."""
MULTIPLE = 16
"""Rows are padded to a multiple of this number of tokens, which limits the number of shapes to compile."""


class Rows:
    """The rows of a range of tokens.

    A document of n tokens has n + 1 labels: its tokens and the end of text after them. The inputs are the tokens
    before the labels: an end of text, and the document's own. So a row has the same tokens as a packed sequence.
    Documents of more than `length` labels are split into rows of `length` and a shorter last one. Of a document that
    crosses the end of the range, only the labels inside belong to it.

    Attributes:
        count: Number of rows.
        num_labels: Number of labels in all rows.
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
        """Finds the rows of `tokens[first:last]`.

        Args:
            tokens: Integers `[num_tokens]`.
            starts: Offset of the first token of each document, integers `[documents]`, ascending from 0.
            first, last: The range.
            length: Maximum number of labels in a row.
            eot_id: The end-of-text token.
        """
        self._tokens = tokens
        self._length = length
        self._eot_id = eot_id
        # the end of text after each document; the last document has none, so its offset is one past the tokens
        ends = np.append(np.asarray(starts[1:], np.int64) - 1, len(tokens))
        begins = np.asarray(starts, np.int64)
        # a range that begins inside a document begins with an input, whose label is the next token
        label_first = np.where(begins >= first, begins, first + 1)
        label_last = np.where((ends < last) | (last == len(tokens)), ends, last - 1)
        counts = label_last - label_first + 1
        # not outside the range, and not empty: between two ends of text there is no document
        used = (ends > begins) & (begins < last) & (ends >= first) & (counts > 0)
        self._firsts, self._counts = label_first[used], counts[used]
        self._row_ends = np.cumsum(-(-self._counts // length))
        self.count = int(self._row_ends[-1]) if len(self._row_ends) else 0
        self.num_labels = int(self._counts.sum())

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """Returns some rows, padded to the longest of them, rounded up to a multiple of 16 but at most `length`."""
        documents = np.searchsorted(self._row_ends, rows, side="right")
        within = rows - np.where(documents > 0, self._row_ends[documents - 1], 0)
        firsts = self._firsts[documents] + within * self._length
        counts = np.minimum(self._length, self._counts[documents] - within * self._length)
        longest = min(self._length, -(-int(counts.max()) // MULTIPLE) * MULTIPLE)
        inputs = np.full((len(rows), longest), self._eot_id, np.int32)
        labels = np.full((len(rows), longest), IGNORED, np.int32)
        mask = np.arange(longest) < counts[:, None]
        for row, (first, count) in enumerate(zip(firsts.tolist(), counts.tolist(), strict=True)):
            skip = int(first == 0)  # the end of text before the first document is not in the file: it is padding
            inputs[row, skip:count] = self._tokens[first - 1 + skip : first - 1 + count]
            # the end of text after the last document is not in the file either
            known = min(count, len(self._tokens) - first)
            labels[row, :known] = self._tokens[first : first + known]
            labels[row, known:count] = self._eot_id
        return {"inputs": inputs, "labels": labels, "attention_mask": mask}


class DocumentDataset(TextDataset):
    """The documents of a text, each in its own rows (`Rows`).

    The training and validation parts are those of `TextDataset`.
    """

    packing: ClassVar[bool] = False

    def __init__(
        self, tokens: NDArray[np.integer], tokenizer: Tokenizer, *, starts: NDArray[np.integer], **options: Any
    ) -> None:
        """Splits the tokens into the two parts.

        Args:
            tokens, tokenizer, options: See `TextDataset`.
            starts: Offset of the first token of each document, integers `[documents]`.

        Raises:
            DataError: The validation part has no rows but is not empty.
        """
        self._starts = starts
        super().__init__(tokens, tokenizer, **options)
        self._train_rows = Rows(tokens, starts, 0, self.num_train_tokens, self.seq_length, tokenizer.eot_id)
        self._epochs = Epochs(self._train_rows.count, self.seed, self._too_few_rows)

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
        """Number of tokens in one row of a batch, on average."""
        return max(1, round(self._train_rows.num_labels / max(1, self._train_rows.count)))

    def train_batch(self, step: int, batch_size: int) -> Batch:
        """Returns the batch of a step, counted from 0: a pure function of (seed, step, batch_size).

        Returns:
            `inputs` and `labels`, int32 `[batch_size, T]`, and `attention_mask`, bool `[batch_size, T]`, False for
            padding. T is at most seq_length. The label of padding is -100.

        Raises:
            DataError: There are fewer rows than a batch has.
        """
        return self._train_rows.batch(self._epochs.rows(step, batch_size)[1])

    def validation_batches(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """Yields batches of validation rows; see `TextDataset.validation_batches` and `train_batch`."""
        count_all = self._validation_rows.count if self.num_validation_tokens else 0
        for rows in validation_rows(count_all, batch_size, count):
            yield self._validation_rows.batch(rows)

    def _too_few_rows(self, batch_size: int) -> str:
        return (
            f"{self.description} has {self._train_rows.count:,} rows to train on, and one batch needs "
            f"{batch_size:,}: name a longer data.source, or lower training.batch_size, or set data.packing=true"
        )
