"""The loop over tokens, and the text that it gives."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from icenet.core.generation.request import Request, Tokens
from icenet.core.generation.sampling import StoppingCriteria
from icenet.core.tokenizers.base import text_after


class Decoder(Protocol):
    """What a backend does for generation; entered while it works."""

    def __enter__(self) -> Decoder: ...

    def __exit__(self, *exception: object) -> None: ...

    def next(self, index: int) -> Any:
        """Submits the choice of new token `index` (0, 1, ...) of every row; gives a handle for `fetch`."""

    def fetch(self, handle: Any) -> Tokens:
        """Waits for a choice: int32 `[B]`."""


def stream(
    decoder: Decoder, request: Request, stops: StoppingCriteria | None = None
) -> Generator[Tokens, None, None]:
    """Yields the next tokens of every row, int32 `[B]`; rows that have ended hold padding.

    Ends when every row has, or after `request.new_tokens`. What a stop text begins with has been yielded
    before the stop is known; `stops.tokens` has what belongs to each row.
    """
    stops = stops or _stops(request)
    with decoder:
        pending = decoder.next(0)
        for index in range(request.new_tokens):
            upcoming = decoder.next(index + 1) if index + 1 < request.new_tokens else None
            chosen = stops.update(decoder.fetch(pending))
            if stops.all_done:
                return
            yield chosen
            pending = upcoming


def _stops(request: Request) -> StoppingCriteria:
    return StoppingCriteria(len(request.tokens), request.settings.stop, request.tokenizer, request.pad_token_id)


def complete(decoder: Decoder, request: Request) -> list[list[int]]:
    """The new tokens of every row, without stops."""
    stops = _stops(request)
    for _ in stream(decoder, request, stops):
        pass
    return stops.tokens


def collect(rows: Sequence[Sequence[int]], request: Request) -> Tokens:
    """Prompts and continuations in one array, int32 `[B, L]`, padded on the right where a row ended early."""
    longest = max((len(row) for row in rows), default=0)
    out = np.full((len(rows), request.tokens.shape[1] + longest), request.pad_token_id, np.int32)
    out[:, : request.tokens.shape[1]] = request.tokens
    for index, row in enumerate(rows):
        out[index, request.tokens.shape[1] : request.tokens.shape[1] + len(row)] = row
    return out


def texts(decoder: Decoder, request: Request) -> list[str]:
    """The new text of every row, without stops."""
    tokenizer = request.tokenizer
    assert tokenizer is not None
    stops = _stops(request)
    for _ in stream(decoder, request, stops):
        pass
    rows = zip(stops.tokens, stops.endings, strict=True)
    return [text_after(tokenizer, tokens) + ending for tokens, ending in rows]


def text_pieces(decoder: Decoder, request: Request) -> Iterator[str]:
    """The text of a request of one row piece by piece, as a person reads it.

    Held back until they are certain: the bytes of an unfinished character, and what may be the beginning of
    a stop text.
    """
    tokenizer = request.tokenizer
    assert tokenizer is not None
    stops = _stops(request)
    endings = [item for item in request.settings.stop if isinstance(item, str)]
    shown = ""
    for _ in stream(decoder, request, stops):
        text = text_after(tokenizer, stops.tokens[0])
        whole = safe = len(text.rstrip("\ufffd"))
        for ending in endings:
            begun = next((n for n in range(len(ending) - 1, 0, -1) if text.endswith(ending[:n], 0, whole)), 0)
            safe = min(safe, whole - begun)
        if safe > len(shown):
            yield text[len(shown) : safe]
            shown = text[:safe]
    yield (text_after(tokenizer, stops.tokens[0]) + stops.endings[0])[len(shown) :]
