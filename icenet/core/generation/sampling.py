"""The rules by which the next token is chosen, and those by which a text ends.

Order, as in Hugging Face's `generate` (logits `[B, V]` in fp32):

    1. repetition_penalty   logits of tokens already in the row (prompt or continuation, not padding):
                            divided by it where positive, multiplied where negative (Keskar et al., 2019)
    2. temperature          0 ends here: the most likely token. Otherwise logits / temperature
    3. top_k                all but the k highest are dropped
    4. top_p                the least likely tokens whose probabilities together are at most 1 - top_p are
                            dropped (Holtzman et al., 2020)
    5. min_p                tokens less than min_p times as likely as the most likely one are dropped
    6. draw                 argmax(logits + g), g = -log(-log(u)): an exact draw from the softmax of what is
                            left (the Gumbel-max trick). u is uniform under `key(seed, "sample", row, index)`,
                            so the draw does not depend on backend, device, batch size or chunking.

The backends implement steps 1 to 6 in `decoder.scores`, on the device. Two backends choose the same token but
where the two best scores are closer than their rounding errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from icenet.core import rng
from icenet.core.tokenizers.base import Tokenizer, text_after

LEAST_TEMPERATURE = 1e-30
"""Divided by less, logits would leave the range of fp32; at this the most likely token is certain."""


def draw_keys(seed: int, rows: int, tokens: int) -> NDArray[np.uint32]:
    """The key of each draw, uint32 `[tokens, rows, 2]`."""
    by_row = rng.fold(rng.key(seed, "sample")[None, :], np.arange(rows))
    return rng.fold(by_row[None, :, :], np.arange(tokens)[:, None])


class StoppingCriteria:
    """Follows each row of a batch and says where it ends.

    A stop token, or the first token of a stop text, ends its row; neither is part of the result. What that first
    token holds before the stop text is in `endings`.
    """

    def __init__(self, rows: int, stop: Sequence[int | str], tokenizer: Tokenizer | None, pad_token_id: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.endings = [""] * rows
        self.done = [False] * rows
        self._ids = {item for item in stop if isinstance(item, int)}
        self._texts = [item for item in stop if isinstance(item, str)]
        self._tokenizer = tokenizer
        self._pad = pad_token_id
        # no token stands for less than a byte
        self._tail = max((len(text.encode()) for text in self._texts), default=0) + 4

    @property
    def all_done(self) -> bool:
        return all(self.done)

    def update(self, chosen: NDArray[np.int32]) -> NDArray[np.int32]:
        """Takes the next token of every row; gives them with padding where a row has ended."""
        out = chosen.copy()
        for row, token in enumerate(chosen.tolist()):
            if not self.done[row]:
                self.tokens[row].append(token)
                self.done[row] = self._ends(row)
            if self.done[row]:
                out[row] = self._pad
        return out

    def _ends(self, row: int) -> bool:
        tokens = self.tokens[row]
        if tokens[-1] in self._ids:
            tokens.pop()
            return True
        if not self._texts or self._tokenizer is None:
            return False
        first = max(0, len(tokens) - self._tail)
        text = text_after(self._tokenizer, tokens[first:])
        starts = [at for stop in self._texts if (at := text.find(stop)) >= 0]
        if not starts:
            return False
        kept = text
        while len(tokens) > first and len(kept) > min(starts):
            tokens.pop()
            kept = text_after(self._tokenizer, tokens[first:])
        self.endings[row] = text[len(kept) : min(starts)]
        return True
