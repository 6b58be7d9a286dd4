"""The decoding loop: tokens and text of a request, whole or as a stream."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

from icenet.core.errors import UsageError
from icenet.core.generation.decoder import DecoderBase
from icenet.core.generation.prompts import encode_prompts
from icenet.core.generation.request import Request, Tokens, check_reads_tokens, make_request
from icenet.core.generation.stopping import StoppingCriteria
from icenet.core.tokenizers.base import decode_continuation


def stream_tokens(
    decoder: DecoderBase, request: Request, stopping: StoppingCriteria | None = None
) -> Generator[Tokens, None, None]:
    """Yields the next token of each row, int32 `[B]`; rows that have ended yield padding.

    The stream ends when all rows have ended, or after `request.new_tokens` tokens. It can yield the first tokens of a
    stop text, because a stop text is detected at its last token. `stopping.tokens` has the tokens without stops.
    """
    stopping = stopping or request.stopping_criteria()
    with decoder:
        pending = decoder.submit(0)
        for index in range(request.new_tokens):
            # the next step is queued before the last token is read, so the device does not wait for the host
            upcoming = decoder.submit(index + 1) if index + 1 < request.new_tokens else None
            chosen = stopping.update(decoder.fetch(pending))
            if stopping.all_done:
                return
            yield chosen
            pending = upcoming


def generate_tokens(decoder: DecoderBase, request: Request) -> list[list[int]]:
    """Returns the new tokens of each row, without stops."""
    return _run(decoder, request).tokens


def append_to_prompts(rows: Sequence[Sequence[int]], request: Request) -> Tokens:
    """Returns prompts and new tokens, int32 `[B, L]`, padded on the right where a row ended early."""
    length = request.tokens.shape[1]
    out = np.full((len(rows), length + max(map(len, rows), default=0)), request.pad_token_id, np.int32)
    out[:, :length] = request.tokens
    for index, row in enumerate(rows):
        out[index, length : length + len(row)] = row
    return out


# ---- text -------------------------------------------------------------------------------------------------


def generate_text(
    model: Any, prompt: str | Sequence[str], stream: bool, options: dict[str, Any]
) -> str | list[str] | Iterator[str]:
    """Continues one text or several; see `icenet.generate`.

    Args:
        model: A `ModelBase` of either backend, with a tokenizer.
        prompt: Text, or list of texts.
        stream: Whether to return an iterator over pieces of text.
        options: Keys of `GenerationConfig`.
    """
    check_reads_tokens(model)
    if model.tokenizer is None:
        raise UsageError("generate: the model has no tokenizer; set model.tokenizer, or use model.generate with ids")
    prompts: list[Any] = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
    wrong = next((item for item in prompts if not isinstance(item, str)), None)
    if wrong is not None:
        raise UsageError(
            f"generate: a prompt must be a text, not {type(wrong).__name__}; use model.generate for token ids"
        )
    ids = encode_prompts(model.tokenizer, prompts)
    if stream and len(ids) != 1:
        raise UsageError("generate: stream=True takes one prompt")
    request = make_request(model, ids, None, 0, options)
    decoder = model.decoder_type(model, request)
    if stream:
        return stream_text(decoder, request)
    texts = generate_texts(decoder, request)
    return texts[0] if isinstance(prompt, str) else texts


def generate_texts(decoder: DecoderBase, request: Request) -> list[str]:
    """Returns the new text of each row, without stops."""
    stopping = _run(decoder, request)
    return [_row_text(request, stopping, row) for row in range(len(stopping.tokens))]


def stream_text(decoder: DecoderBase, request: Request) -> Iterator[str]:
    """Yields the new text of a request with one row, in pieces.

    Text is held back while it can still change: bytes of an unfinished character, and the possible beginning of a
    stop text.
    """
    assert request.tokenizer is not None
    stopping = request.stopping_criteria()
    stop_texts = [item for item in request.settings.stop if isinstance(item, str)]
    shown = ""
    for _ in stream_tokens(decoder, request, stopping):
        text = decode_continuation(request.tokenizer, stopping.tokens[0])
        complete = safe = len(text.rstrip("\ufffd"))  # the replacement character stands for unfinished bytes
        for stop in stop_texts:
            overlap = next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n], 0, complete)), 0)
            safe = min(safe, complete - overlap)
        if safe > len(shown):
            yield text[len(shown) : safe]
            shown = text[:safe]
    yield _row_text(request, stopping, 0)[len(shown) :]


def _run(decoder: DecoderBase, request: Request) -> StoppingCriteria:
    """Generates all tokens. Returns the stopping criteria, which have the tokens of each row."""
    stopping = request.stopping_criteria()
    for _ in stream_tokens(decoder, request, stopping):
        pass
    return stopping


def _row_text(request: Request, stopping: StoppingCriteria, row: int) -> str:
    assert request.tokenizer is not None
    return decode_continuation(request.tokenizer, stopping.tokens[row]) + stopping.endings[row]
