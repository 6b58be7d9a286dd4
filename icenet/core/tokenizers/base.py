"""How text becomes tokens and tokens become text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import DataError

FILE = "tokenizer.json"
"""The name under which a tokenizer's file goes with a checkpoint or a saved model."""


class Tokenizer(Protocol):
    """What data and generation need of a tokenizer."""

    name: str
    """Names the tokenizer and its vocabulary: two with one name give the same tokens."""
    vocab_size: int
    """One more than the largest token."""
    eot_id: int
    """The token that ends a text."""
    files: Mapping[str, bytes]
    """What makes the tokenizer anew elsewhere (`from_files`), by file name; empty where nothing is needed."""
    bytes_per_second: float
    """About how much text one process can read; decides whether more are worth their start."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def continuation(self, ids: Iterable[int]) -> str:
        """The text of ids that go on from a text before them: a space between the two is kept."""
        ...

    def begins(self, data: bytes, at: int) -> int | None:
        """The first place from `at` on where a token of `data`, UTF-8, begins; None where it is not UTF-8."""
        ...

    def encode_part(self, data: bytes, first: int, last: int) -> NDArray[np.integer]:
        """The tokens of `data[first:last]` as they are in the midst of `data`, UTF-8 cut between characters.

        Raises:
            UnicodeDecodeError: it is not UTF-8.
        """
        ...


def utf8(text: str) -> bytes:
    """A text's bytes; bytes of the command line that are no UTF-8 arrive escaped, and go on as they were.

    Raises:
        DataError: a lone surrogate, which UTF-8 cannot hold.
    """
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError as error:
        raise DataError(f"the text has a lone surrogate at {error.start}, no character") from None


def text_after(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """`tokenizer.continuation`, or `decode` of a tokenizer of the user's own that has none."""
    continuation = getattr(tokenizer, "continuation", tokenizer.decode)
    text: str = continuation(ids)
    return text
