"""The decoding loop: tokens and text of a request, whole or as a stream."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from icenet.core.errors import NonFiniteError, UsageError
from icenet.core.generation.batching import generate_batch, rows_that_join
from icenet.core.generation.decoder import DecoderBase
from icenet.core.generation.prompts import encode_prompts
from icenet.core.generation.request import Request, Tokens, check_reads_tokens, make_request, settings_of
from icenet.core.generation.speculative import DraftReport, make_decoder
from icenet.core.generation.stopping import FinishReason, StoppingCriteria
from icenet.core.tokenizers.base import Tokenizer, decode_continuation, unstable_characters


@dataclass(frozen=True)
class Continuation:
    """The continuation of one prompt.

    Attributes:
        tokens: The new tokens, without stops.
        finish_reason: "stop" for a stop token or text, "end" for the end of the text, "length" for the limit.
        text: The new text, without stops; None without a tokenizer.
        draft: How many tokens of a draft were accepted; None without a draft.
    """

    tokens: list[int]
    finish_reason: FinishReason
    text: str | None = None
    draft: DraftReport | None = None


def stream_tokens(
    decoder: DecoderBase, request: Request, stopping: StoppingCriteria | None = None
) -> Generator[Tokens, None, list[FinishReason]]:
    """Yields the next token of each row, int32 `[B]`; rows that have ended yield padding.

    The stream ends when all rows have ended. It can yield the first tokens of a stop text, because a stop text is
    detected at its last token. `stopping.tokens` has the tokens without stops.

    Returns:
        Why each row has ended (the value of the generator's `StopIteration`).

    Raises:
        NonFiniteError: The logits of a row are NaN or infinite.
    """
    stopping = stopping or request.stopping_criteria()
    with decoder:
        pending = decoder.submit(0)
        for index in range(request.new_tokens):
            # the next step is queued before the last token is read, so the device does not wait for the host
            upcoming = decoder.submit(index + 1) if index + 1 < request.new_tokens else None
            try:
                chosen = stopping.update(decoder.fetch(pending))
            except NonFiniteError as error:
                raise request.explain(error, decoder.model, stopping.tokens) from None
            if not stopping.all_done:
                yield chosen
                pending = upcoming
                continue
            if max(map(len, stopping.tokens)) == index + 1:  # a row has ended with a token of this step
                yield chosen
            break
    return stopping.reasons()


def generate_tokens(decoder: DecoderBase, request: Request) -> list[Continuation]:
    """Returns the continuation of each row, as tokens and, if the model has a tokenizer, as text.

    At most `max_batch_size` rows are decoded at a time. Those that can share slots do (`generation.batching`).
    """
    rows, size = range(len(request.tokens)), request.settings.max_batch_size
    joining = rows_that_join(decoder.model, request) if len(rows) > 1 else []
    others = [row for row in rows if row not in joining]
    found: dict[int, Continuation] = {}
    for part in [joining, *(others[first : first + size] for first in range(0, len(others), size))]:
        if not part:
            continue
        own, its_request = decoder, request
        if len(part) < len(rows):
            its_request = request.select(part)
            own = type(decoder)(decoder.model, its_request)
        stopping = its_request.stopping_criteria()
        if part is joining:
            generate_batch(own, stopping)
        else:
            for _ in stream_tokens(own, its_request, stopping):
                pass
        for index, row in enumerate(part):
            text = None if request.tokenizer is None else _row_text(its_request, stopping, index)
            report = getattr(own, "report", None)
            found[row] = Continuation(stopping.tokens[index], stopping.reasons()[index], text, report)
    return [found[row] for row in rows]


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
    model: Any,
    prompt: str | Sequence[str],
    stream: bool,
    details: bool,
    options: dict[str, Any],
    speedups: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Continues one text or several. Returns what `icenet.generate` describes.

    Args:
        model: A `ModelBase` of either backend, with a tokenizer.
        prompt: Text, or list of texts.
        stream: Whether to return an iterator over pieces of text.
        details: Whether to return tokens and finish reasons too.
        options: Keys of `GenerationConfig`.
        speedups: Arguments of `make_decoder`: cache, draft, num_draft_tokens.
    """
    check_reads_tokens(model)
    if model.tokenizer is None:
        raise UsageError("generate: the model has no tokenizer; set model.tokenizer, or use model.generate with ids")
    prompts: list[Any] = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
    if wrong := [item for item in prompts if not isinstance(item, str)]:
        raise UsageError(
            f"generate: a prompt must be a text, not {type(wrong[0]).__name__}; use model.generate for token ids"
        )
    if stream and len(prompts) != 1:
        raise UsageError(f"generate: stream=True takes one prompt, not {len(prompts)}")
    if stream and details:
        raise UsageError("generate: details=True needs stream=False; a stream returns the finish reason at its end")
    if options.get("max_batch_size") is not None and (stream or isinstance(prompt, str)):
        raise UsageError("generate: max_batch_size has no effect with one prompt; give a list of prompts")
    settings = settings_of(model, options)
    if not prompts:
        return []
    ids = encode_prompts(model.tokenizer, prompts, settings.add_special_tokens)
    request = make_request(model, ids, None, 0, options)
    decoder = make_decoder(model, request, **speedups)
    if stream:
        return stream_text(decoder, request)
    found = generate_tokens(decoder, request)
    results: list[Any] = [item if details else item.text for item in found]
    return results[0] if isinstance(prompt, str) else results


def stream_text(decoder: DecoderBase, request: Request) -> Generator[str, None, FinishReason]:
    """Yields the new text of a request with one row, in pieces.

    Text is held back while it can still change: bytes of an unfinished character, and the possible beginning of a
    stop text. After Ctrl-C the text that was held back is yielded before KeyboardInterrupt is raised.

    Returns:
        Why the row has ended (the value of the generator's `StopIteration`).
    """
    assert request.tokenizer is not None
    stopping, tail, shown = request.stopping_criteria(), TextTail(request.tokenizer), 0
    unstable = unstable_characters(request.tokenizer)
    try:
        for _ in stream_tokens(decoder, request, stopping):
            text = tail.decode(stopping.tokens[0], shown)
            complete = text.rstrip("\ufffd")  # the replacement character stands for unfinished bytes
            safe = tail.start + len(complete) - max(stopping.held_back(complete), unstable)
            if safe > shown:
                piece, shown = text[shown - tail.start : safe - tail.start], safe
                yield piece
    except KeyboardInterrupt:
        if rest := _row_text(request, stopping, 0)[shown:]:
            yield rest
        raise
    if rest := _row_text(request, stopping, 0)[shown:]:
        yield rest
    return stopping.reasons()[0]


class TextTail:
    """Decodes the last tokens of a growing sequence, in a time that does not depend on its length.

    Attributes:
        start: Number of characters of the whole text before the text that `decode` returned.
    """

    context = 32  # tokens that the text of later ones may depend on

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.start = 0
        self._tokenizer = tokenizer
        self._first = 0

    def decode(self, tokens: Sequence[int], shown: int) -> str:
        """Returns the end of the text of `tokens`, which begins before character `shown` of the text."""
        text = decode_continuation(self._tokenizer, tokens[self._first :])
        if len(tokens) - self._first < 4 * self.context:
            return text
        for first in range(len(tokens) - self.context, len(tokens) - self.context // 2):
            ending = decode_continuation(self._tokenizer, tokens[first:])
            start = self.start + len(text) - len(ending)
            if text.endswith(ending) and not ending.startswith("\ufffd") and start <= shown:
                self._first, self.start = first, start
                return ending
        return text


def _row_text(request: Request, stopping: StoppingCriteria, row: int) -> str:
    assert request.tokenizer is not None
    return decode_continuation(request.tokenizer, stopping.tokens[row]) + stopping.endings[row]
