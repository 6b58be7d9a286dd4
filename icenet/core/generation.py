"""Generation without a framework: what is asked, the loop over tokens, and what is given back.

A backend's `Decoder` reads the prompt and chooses tokens on its device; the loop here submits the work for
the next token before it looks at the last one, so the device never waits for the host.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from icenet.core.config import GenerationConfig
from icenet.core.data.tokenizer import Tokenizer, text_after
from icenet.core.errors import UsageError
from icenet.core.model import ModelFacts
from icenet.core.prompts import batch_of
from icenet.core.sampling import Stops, draw_keys

Tokens = NDArray[np.int32]
DEFAULT_NEW_TOKENS = 100


@dataclass(frozen=True)
class Request:
    """A checked request: prompts `[B, T]`, which of their positions are real, and the settings."""

    tokens: Tokens
    visible: NDArray[np.bool_] | None
    settings: GenerationConfig
    new_tokens: int
    window: int | None
    seed: int
    pad_token_id: int
    tokenizer: Tokenizer | None

    def keys(self) -> NDArray[np.uint32] | None:
        """The key of every draw, uint32 `[new_tokens, B, 2]`; None where nothing is drawn."""
        if self.settings.temperature == 0:
            return None
        return draw_keys(self.seed, self.tokens.shape[0], self.new_tokens)

    def seen(self, vocab_size: int) -> NDArray[np.bool_] | None:
        """Which tokens each prompt holds, bool `[B, V]`; None where no penalty needs it."""
        if self.settings.repetition_penalty == 1:
            return None
        seen = np.zeros((self.tokens.shape[0], vocab_size), np.bool_)
        for row, tokens in enumerate(self.tokens):
            seen[row, tokens if self.visible is None else tokens[self.visible[row]]] = True
        return seen


class Decoder(Protocol):
    """What a backend does for generation; entered while it works."""

    def __enter__(self) -> Decoder: ...

    def __exit__(self, *exception: object) -> None: ...

    def next(self, index: int) -> Any:
        """Submits the choice of new token `index` (0, 1, ...) of every row; gives a handle for `fetch`."""

    def fetch(self, handle: Any) -> Tokens:
        """Waits for a choice: int32 `[B]`."""


def check_reads_tokens(model: ModelFacts) -> None:
    """Refuses a model that has no text to continue."""
    if model.config.reads not in ("tokens", "anything"):
        raise UsageError(
            f"generate: a model of type {model.config.type} reads {model.config.reads} and continues no text; "
            "icenet predict classifies images"
        )


def request(
    model: ModelFacts,
    input_ids: Any,
    attention_mask: Any,
    pad_token_id: int,
    options: Mapping[str, Any],
) -> Request:
    """Checks what is asked of a model, before any work is done.

    `options` are the keys of `GenerationConfig`; None takes the model's own setting. `stop` texts need a
    model with a tokenizer.

    Raises:
        UsageError: an option or prompt that cannot be served, and what would be.
    """
    check_reads_tokens(model)
    base = model.generation or GenerationConfig()
    values = base.model_dump()
    given = {key: value for key, value in options.items() if value is not None}
    if "max_length" in given and "max_new_tokens" not in given:
        values["max_new_tokens"] = None
    given = {key: _plain(value) for key, value in given.items()}
    if "stop" in given and not isinstance(given["stop"], list):
        given["stop"] = [given["stop"]]
    settings = GenerationConfig(**{**values, **given})

    vocab_size = model.config.vocab_size
    tokens, visible = batch_of(input_ids, attention_mask, pad_token_id, vocab_size)
    if visible is not None and not hasattr(model, "make_cache"):
        raise UsageError("generate: this model has no attention_mask; give it prompts of equal length")
    for item in settings.stop:
        if isinstance(item, int) and not 0 <= item < vocab_size:
            raise UsageError(f"generate: stop token {item} is outside the vocabulary (0 to {vocab_size - 1})")
    length = tokens.shape[1]
    window = getattr(model.config, "max_seq_length", None)
    if not getattr(model.config, "causal", True):
        raise UsageError("generate: this model sees the tokens to come (model.causal: false)")
    if getattr(model.config, "bidirectional", False):
        raise UsageError("generate: this model sees the tokens to come (model.bidirectional: true)")
    if settings.max_new_tokens is not None:
        new_tokens = settings.max_new_tokens
    elif settings.max_length is not None:
        new_tokens = settings.max_length - length
        if new_tokens < 1:
            raise UsageError(
                f"generate: max_length {settings.max_length} leaves no room after a prompt of {length} tokens; "
                "raise it or use max_new_tokens"
            )
    else:
        new_tokens = DEFAULT_NEW_TOKENS
        if window is not None and settings.overflow == "error":
            new_tokens = max(1, min(new_tokens, window - length))
    if window is not None and length + new_tokens > window and settings.overflow == "error":
        raise UsageError(
            f"generate: a prompt of {length} tokens and {new_tokens} new ones exceed model.max_seq_length {window}; "
            "ask for fewer, or pass overflow='slide' to forget the oldest tokens"
        )
    if any(isinstance(item, str) for item in settings.stop) and model.tokenizer is None:
        raise UsageError("generate: stop texts need a model with a tokenizer; give stop tokens")
    if "" in settings.stop:
        raise UsageError("generate: an empty stop text would end every text")
    seed = settings.seed if settings.seed is not None else 0
    return Request(tokens, visible, settings, new_tokens, window, seed, pad_token_id, model.tokenizer)


def _plain(value: Any) -> Any:
    """numpy's scalars as Python's, which the configuration checks."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def stream(decoder: Decoder, request: Request, stops: Stops | None = None) -> Generator[Tokens, None, None]:
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


def _stops(request: Request) -> Stops:
    return Stops(len(request.tokens), request.settings.stop, request.tokenizer, request.pad_token_id)


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


# ---- text -------------------------------------------------------------------------------------------------


def read_prompt(path: Path) -> str:
    """The text of a prompt file; `-` is the standard input."""
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text in UTF-8"
        raise UsageError(f"{path}: the prompt cannot be read: {reason}") from None


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts; an empty text starts from the end-of-text token."""
    return [tokenizer.encode(prompt) or [tokenizer.eot_id] for prompt in prompts]


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
