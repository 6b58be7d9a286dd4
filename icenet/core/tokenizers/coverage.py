"""Which characters of a text a tokenizer has tokens for."""

from __future__ import annotations

import re
from typing import Any

from icenet.core.tokenizers.library import library


class Coverage:
    """Finds parts of texts that a tokenizer has no token for.

    Without an unknown token, the library's BPE drops such characters silently, and its other models fail.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = sorted((token.content for token in tokenizer.get_added_tokens_decoder().values()), key=len)
        self._added = re.compile("|".join(map(re.escape, reversed(added)))) if added else None
        self._known: dict[str, bool] = {}
        probe = "\U000f0000"  # a character for private use
        complete = self.has_token(probe)
        if complete and self._pieces(probe) != [(probe, 0)]:  # written as bytes: each must have a token
            complete = all(map(self._covers, library().pre_tokenizers.ByteLevel.alphabet()))
        is_bpe = isinstance(tokenizer.model, library().models.BPE)
        self.is_silent = is_bpe and not complete
        """Whether the library drops characters without an error."""
        affixes = is_bpe and (tokenizer.model.continuing_subword_prefix or tokenizer.model.end_of_word_suffix)
        self._by_character = is_bpe and not affixes

    def has_token(self, character: str) -> bool:
        """Returns whether a character alone can be encoded."""
        if character not in self._known:
            self._known[character] = all(self._covers(piece) for piece, _ in self._pieces(character))
        return self._known[character]

    def first_unknown(self, text: str) -> tuple[str, int] | None:
        """Returns the first part without a token and its index; None if there is none."""
        if self._by_character and all(map(self.has_token, set(text))):
            return None
        first = 0
        for found in [*(self._added.finditer(text) if self._added else ()), None]:
            end = found.start() if found else len(text)
            for piece, offset in self._pieces(text[first:end]):
                if not self._covers(piece):
                    part = next((character for character in piece if not self.has_token(character)), piece)
                    position = text.find(part, first + offset)
                    return part, position if position >= 0 else first + offset  # a normalizer changes the text
            first = found.end() if found else end
        return None

    def _pieces(self, text: str) -> list[tuple[str, int]]:
        """Returns what the model encodes of a text, with offsets: words, usually."""
        tokenizer = self._tokenizer
        if not text:
            return []
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        if tokenizer.pre_tokenizer is None:
            return [(text, 0)]
        return [(piece, offsets[0]) for piece, offsets in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    def _covers(self, piece: str) -> bool:
        """Returns whether the tokens of a piece cover all of its bytes."""
        try:
            tokens = self._tokenizer.model.tokenize(piece)
        except Exception:  # what the library raises without an unknown token
            return False
        return sum(last - first for first, last in (token.offsets for token in tokens)) == len(piece.encode())
