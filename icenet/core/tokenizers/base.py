"""The interface of tokenizers, which turn text into token ids and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
"""Name of the tokenizer's file in a checkpoint and in the folder of a saved model."""


class NoTokenError(DataError):
    """A text with a part that the tokenizer has no token for.

    Attributes:
        part: The character, or the word of a tokenizer of words.
        position: Its index in the text.
        index: Index of the text in a batch.
    """

    def __init__(self, message: str, part: str, position: int, index: int = 0) -> None:
        super().__init__(message)
        self.part, self.position, self.index = part, position, index


class Tokenizer(Protocol):
    """A tokenizer as data and generation use it."""

    name: str
    """Identifies the tokenizer and its vocabulary: tokenizers with the same name produce the same tokens."""
    vocab_size: int
    """The largest token id plus one."""
    eot_id: int
    """The end-of-text token, which separates documents and ends generation."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """The files that define the tokenizer, by name. Checkpoints store them; empty if none are needed."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without special tokens around it."""
        ...

    def encode_batch(self, texts: Sequence[str], continues: Sequence[bool]) -> list[NDArray[Any]]:
        """Returns the tokens of several texts, integer `[tokens]` each. May use several threads.

        Args:
            texts: The texts.
            continues: For each text, whether it continues another one. Then its tokens decode to the text as it is,
                even if the tokenizer puts a space before the first word of a text.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of tokens, without special tokens."""
        ...

    def decode_continuation(self, ids: Iterable[int]) -> str:
        """Returns the text of tokens that follow other text: a space at its beginning is kept."""
        ...


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens that end a text: `tokenizer.end_ids`, or `eot_id` for a user's tokenizer without them."""
    found: tuple[int, ...] = getattr(tokenizer, "end_ids", (tokenizer.eot_id,))
    return found


def special_tokens(tokenizer: Tokenizer) -> Mapping[str, int]:
    """Returns the ids of the tokens with a name that `decode` leaves out: `tokenizer.special_tokens`, if any."""
    found: Mapping[str, int] = getattr(tokenizer, "special_tokens", {})
    return found


def utf8(text: str) -> bytes:
    """Returns the UTF-8 bytes of a text. Surrogate escapes (invalid bytes of the command line) become those bytes.

    Raises:
        DataError: The text has another lone surrogate, which UTF-8 cannot represent.
    """
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError as error:
        raise DataError(f"the text has a lone surrogate at {error.start}, which is not a character") from None


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the tokens of a text with those that the tokenizer puts around it.

    That is `tokenizer.encode_prompt(text)`, or `encode(text)` for a tokenizer without that method.
    """
    encode = getattr(tokenizer, "encode_prompt", tokenizer.encode)
    tokens: list[int] = encode(text)
    return tokens


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> tuple[list[NDArray[Any]], int]:
    """Returns the tokens of each text with those that the tokenizer puts around it, and how many texts were cut.

    That is `tokenizer.encode_texts(texts, limit)`, or `encode(text)[:limit]` for a tokenizer without that method.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
        limit: Number of tokens, those around a text included, after which it is cut.

    Returns:
        Integers `[tokens]` for each text, and the number of texts that have more.
    """
    if (encode := getattr(tokenizer, "encode_texts", None)) is not None:
        found: tuple[list[NDArray[Any]], int] = encode(texts, limit)
        return found
    rows = [np.array(tokenizer.encode(text), np.int64) for text in texts]
    return [row[:limit] for row in rows], sum(len(row) > limit for row in rows)


def unstable_characters(tokenizer: Tokenizer) -> int:
    """Returns how many characters at the end of a text the next token may change, without unfinished characters."""
    return int(getattr(tokenizer, "unstable_characters", 0))


def decode_continuation(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Returns `tokenizer.decode_continuation(ids)`, or `decode(ids)` for a user's tokenizer without that method."""
    decode = getattr(tokenizer, "decode_continuation", tokenizer.decode)
    text: str = decode(ids)
    return text
