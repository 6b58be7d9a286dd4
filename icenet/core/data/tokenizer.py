"""How text becomes tokens and tokens become text."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import DataError


class Tokenizer(Protocol):
    """What data and generation need of a tokenizer."""

    name: str
    """Names the tokenizer and its vocabulary: two with one name give the same tokens."""
    vocab_size: int
    eot_id: int
    """The token that ends a text."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def encode_stream(self, chunks: Iterable[str]) -> Iterator[NDArray[np.integer]]:
        """The tokens of one text that comes in pieces: as many as `encode` of the pieces joined."""
        ...


class ByteTokenizer:
    """UTF-8 bytes: ids 0 to 255 are the bytes, 256 ends a text. Any text comes back as it was."""

    name = "bytes"
    vocab_size = 257
    eot_id = 256

    def encode(self, text: str) -> list[int]:
        """The bytes of a text, as ids.

        Raises:
            DataError: a lone surrogate, which UTF-8 cannot hold.
        """
        try:
            # bytes of the command line that are no UTF-8 arrive escaped, and go on as they were
            return list(text.encode("utf-8", errors="surrogateescape"))
        except UnicodeEncodeError as error:
            raise DataError(f"the text has a lone surrogate at {error.start}, no character") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. End of text is left out.

        Bytes that are no UTF-8 become U+FFFD, and so do ids above 256: a model may have a larger vocabulary.
        """
        values = np.fromiter(ids, dtype=np.int64)
        values = np.where((values < 0) | (values > self.eot_id), 0xFF, values)  # a byte that UTF-8 never has
        return bytes(values[values != self.eot_id].tolist()).decode("utf-8", errors="replace")

    def encode_stream(self, chunks: Iterable[str]) -> Iterator[NDArray[np.integer]]:
        """The bytes of a text that comes in pieces, uint8 `[bytes of the piece]` each."""
        for chunk in chunks:
            yield np.frombuffer(chunk.encode("utf-8"), np.uint8)


_TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {"bytes": ByteTokenizer}


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name, as `data.tokenizer` gives it: 'bytes'.

    Raises:
        DataError: no tokenizer has this name.
    """
    if name not in _TOKENIZERS:
        close = difflib.get_close_matches(name, _TOKENIZERS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(_TOKENIZERS)}"
        raise DataError(f"data.tokenizer: no tokenizer {name!r}; {hint}")
    return _TOKENIZERS[name]()
