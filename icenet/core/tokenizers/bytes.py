"""The byte tokenizer: the 256 bytes of UTF-8 and an end-of-text token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.tokenizers.base import utf8


class ByteTokenizer:
    """UTF-8 bytes: ids 0 to 255 are the bytes, 256 is the end of a text. Decoding returns any text unchanged."""

    name = "bytes"
    vocab_size = 257
    eot_id = 256
    end_ids = (256,)
    special_tokens: Mapping[str, int] = {}  # the end-of-text token has no name
    files: Mapping[str, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """Returns the bytes of a text as ids.

        Raises:
            DataError: The text has a lone surrogate, which UTF-8 cannot represent.
        """
        return list(utf8(text))

    def encode_batch(self, texts: Sequence[str], continues: Sequence[bool] = ()) -> list[NDArray[Any]]:
        """Returns the bytes of each text, uint8 `[bytes]`. `continues` has no effect."""
        return [np.frombuffer(utf8(text), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, without end-of-text tokens.

        Invalid UTF-8 becomes U+FFFD, and so do ids outside the vocabulary: a model may have a larger one.
        """
        values = np.fromiter(ids, dtype=np.int64)
        values = np.where((values < 0) | (values > self.eot_id), 0xFF, values)  # 0xFF is never valid in UTF-8
        return bytes(values[values != self.eot_id].tolist()).decode("utf-8", errors="replace")

    decode_continuation = decode
