"""Stopping criteria: stop tokens, stop texts, the end of a text and the limit, tracked for each row of a batch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import NonFiniteError
from icenet.core.tokenizers.base import Tokenizer, decode_continuation, special_tokens

FinishReason = Literal["stop", "end", "length"]
"""Why a row has ended: at a stop token or text, at an end-of-text token, or at its maximum number of new tokens."""
_MARKERS = 0xD800  # surrogates, which no decoded text contains


class StoppingCriteria:
    """Tracks the new tokens of each row and detects where the row ends.

    A stop token, an end-of-text token, or the first token of a stop text ends its row and is not part of the result.
    If that first token also contains text before the stop text, this text is kept in `endings`.

    A stop text may contain names of special tokens, which decoding leaves out: it matches those tokens.

    Attributes:
        tokens: New tokens of each row, without stops.
        endings: Text of each row between its last token and its stop text.
        finish_reasons: Why each row has ended; None while it continues.
    """

    def __init__(
        self,
        rows: int,
        stop: Sequence[int | str],
        tokenizer: Tokenizer | None,
        pad_token_id: int,
        *,
        end_ids: Collection[int] = (),
        limits: Sequence[int] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Prepares the criteria.

        Args:
            rows: Number of rows.
            stop: Stop tokens and stop texts.
            tokenizer: Decodes the tokens, if there are stop texts.
            pad_token_id: Token for rows that have ended.
            end_ids: End-of-text tokens.
            limits: Maximum number of new tokens of each row, or None.
            numbers: Number of each row in messages; None if they are 0, 1, ...
        """
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.endings = [""] * rows
        self.finish_reasons: list[FinishReason | None] = [None] * rows
        self._limits = limits
        self._numbers = range(rows) if numbers is None else numbers
        self._tokenizer = tokenizer
        self._pad_token_id = pad_token_id
        self._stop_ids = {item for item in stop if isinstance(item, int)}
        self._end_ids = frozenset(end_ids)
        self._texts = [item for item in stop if isinstance(item, str)]
        self._markers: dict[int, str] = {}  # the character that stands for a special token in `_text`
        self._hidden: frozenset[int] = frozenset()  # tokens without text
        if self._texts and tokenizer is not None:
            self._match_special_tokens(special_tokens(tokenizer))
        # Other tokens stand for at least one byte, so a stop text spans at most this many of them. Four more hold an
        # unfinished character.
        size = max((len(text.encode(errors="replace")) for text in self._texts), default=0)
        self._max_stop_tokens = size + 4
        self._visible = [self._without_markers(text) for text in self._texts]

    def _match_special_tokens(self, names: Mapping[str, int]) -> None:
        """Makes stop texts match the special tokens that they name, as well as ordinary tokens with the same text."""
        self._hidden = frozenset({*names.values(), getattr(self._tokenizer, "eot_id", -1)})
        self._stop_ids |= {names[text] for text in self._texts if text in names}
        if not names:
            return
        pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))

        def marker(match: re.Match[str]) -> str:
            return self._markers.setdefault(names[match[0]], chr(_MARKERS + len(self._markers)))

        mixed = [text for text in self._texts if text not in names and pattern.search(text)]
        self._texts += [pattern.sub(marker, text) for text in mixed]

    @property
    def all_done(self) -> bool:
        """Whether every row has ended."""
        return None not in self.finish_reasons

    def reasons(self) -> list[FinishReason]:
        """Returns why each row has ended, after the last step."""
        return [reason or "length" for reason in self.finish_reasons]

    def update(self, chosen: NDArray[np.int32]) -> NDArray[np.int32]:
        """Adds the next token of each row, int32 `[B]`. Returns the same tokens, with padding in ended rows.

        Raises:
            NonFiniteError: The token of a row that has not ended is -1, because its logits were not finite.
        """
        out = chosen.copy()
        for row, token in enumerate(chosen.tolist()):
            if self.finish_reasons[row] is None and not self.add(row, token):
                continue
            out[row] = self._pad_token_id
        return out

    def add(self, row: int, token: int) -> bool:
        """Adds a token to a row that has not ended. Returns whether it is a stop, which is not part of the result.

        Raises:
            NonFiniteError: The token is -1, because the logits were not finite.
        """
        tokens = self.tokens[row]
        if token < 0:
            number = self._numbers[row]
            raise NonFiniteError(f"generate: the logits are not finite at token {len(tokens)} of row {number}")
        reason: FinishReason | None = None
        if token in self._stop_ids:
            reason = "stop"
        elif token in self._end_ids:
            reason = "end"
        else:
            tokens.append(token)
            if self._texts and self._remove_stop_text(row):
                reason = "stop"
        if reason is None and self._limits is not None and len(tokens) >= self._limits[row]:
            self.finish_reasons[row] = "length"
            return False
        self.finish_reasons[row] = reason
        return reason is not None

    def _remove_stop_text(self, row: int) -> bool:
        """Returns whether a row has reached a stop text, and removes the text from its tokens."""
        if self._tokenizer is None:
            return False
        tokens = self.tokens[row]
        first, needed = len(tokens), self._max_stop_tokens
        while first > 0 and needed > 0:
            first -= 1
            needed -= tokens[first] not in self._hidden or tokens[first] in self._markers
        text = self._text(tokens[first:])
        starts = [start for stop in self._texts if (start := text.find(stop)) >= 0]
        if not starts:
            return False
        kept = text
        while len(tokens) > first and len(kept) > min(starts):
            tokens.pop()
            kept = self._text(tokens[first:])
        self.endings[row] = text[len(kept) : min(starts)]
        return True

    def _text(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, with a marker for each special token that a stop text names."""
        assert self._tokenizer is not None
        pieces, start = [], 0
        for index, token in enumerate(tokens if self._markers else ()):
            if token in self._markers:
                pieces += [decode_continuation(self._tokenizer, tokens[start:index]), self._markers[token]]
                start = index + 1
        return "".join([*pieces, decode_continuation(self._tokenizer, tokens[start:])])

    def _without_markers(self, text: str) -> str:
        return "".join(character for character in text if character not in self._markers.values())

    def held_back(self, text: str) -> int:
        """Returns how many characters at the end of a text may be the beginning of a stop text."""
        held = 0
        for visible, stop in zip(self._visible, self._texts, strict=True):
            longest = min(len(text), len(visible) - (len(visible) == len(stop)))
            held = max(held, next((n for n in range(longest, 0, -1) if text.endswith(visible[:n])), 0))
        return held
