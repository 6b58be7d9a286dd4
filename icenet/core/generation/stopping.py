"""Stopping criteria: stop tokens and stop texts, tracked for each row of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from icenet.core.tokenizers.base import Tokenizer, decode_continuation


class StoppingCriteria:
    """Tracks the new tokens of each row and detects where the row ends.

    A stop token, or the first token of a stop text, ends its row and is not part of the result. If that first token
    also contains text before the stop text, this text is kept in `endings`.

    Attributes:
        tokens: New tokens of each row, without stops.
        endings: Text of each row between its last token and its stop text.
        done: Whether each row has ended.
    """

    def __init__(self, rows: int, stop: Sequence[int | str], tokenizer: Tokenizer | None, pad_token_id: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.endings = [""] * rows
        self.done = [False] * rows
        self._ids = {item for item in stop if isinstance(item, int)}
        self._texts = [item for item in stop if isinstance(item, str)]
        self._tokenizer = tokenizer
        self._pad_token_id = pad_token_id
        # Each token stands for at least one byte, so a stop text spans at most this many tokens. Four more hold an
        # unfinished character.
        self._max_stop_tokens = max((len(text.encode()) for text in self._texts), default=0) + 4

    @property
    def all_done(self) -> bool:
        """Whether every row has ended."""
        return all(self.done)

    def update(self, chosen: NDArray[np.int32]) -> NDArray[np.int32]:
        """Adds the next token of each row, int32 `[B]`. Returns the same tokens, with padding in ended rows."""
        out = chosen.copy()
        for row, token in enumerate(chosen.tolist()):
            if not self.done[row]:
                self.tokens[row].append(token)
                self.done[row] = self._ends(row)
            if self.done[row]:
                out[row] = self._pad_token_id
        return out

    def _ends(self, row: int) -> bool:
        """Returns whether a row has reached a stop, and removes the stop from its tokens."""
        tokens = self.tokens[row]
        if tokens[-1] in self._ids:
            tokens.pop()
            return True
        if not self._texts or self._tokenizer is None:
            return False
        first = max(0, len(tokens) - self._max_stop_tokens)
        text = decode_continuation(self._tokenizer, tokens[first:])
        starts = [start for stop in self._texts if (start := text.find(stop)) >= 0]
        if not starts:
            return False
        kept = text
        while len(tokens) > first and len(kept) > min(starts):
            tokens.pop()
            kept = decode_continuation(self._tokenizer, tokens[first:])
        self.endings[row] = text[len(kept) : min(starts)]
        return True
