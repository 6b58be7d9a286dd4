"""The byte tokenizer: UTF-8 bytes and one token for the end of a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from icenet.core.tokenizers.base import utf8


class ByteTokenizer:
    """UTF-8 bytes: ids 0 to 255 are the bytes, 256 ends a text. Any text comes back as it was."""

    name = "bytes"
    vocab_size = 257
    eot_id = 256
    files: Mapping[str, bytes] = {}
    bytes_per_second = 2e8

    def encode(self, text: str) -> list[int]:
        """The bytes of a text, as ids.

        Raises:
            DataError: a lone surrogate, which UTF-8 cannot hold.
        """
        return list(utf8(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. End of text is left out.

        Bytes that are no UTF-8 become U+FFFD, and so do ids above 256: a model may have a larger vocabulary.
        """
        values = np.fromiter(ids, dtype=np.int64)
        values = np.where((values < 0) | (values > self.eot_id), 0xFF, values)  # a byte that UTF-8 never has
        return bytes(values[values != self.eot_id].tolist()).decode("utf-8", errors="replace")

    continuation = decode

    def begins(self, data: bytes, at: int) -> int | None:
        """Every byte is a token."""
        return at

    def encode_part(self, data: bytes, first: int, last: int) -> NDArray[np.integer]:
        """The bytes, uint8 `[last - first]`."""
        part = data[first:last]
        part.decode("utf-8")  # raises where it is no text
        return np.frombuffer(part, np.uint8)
