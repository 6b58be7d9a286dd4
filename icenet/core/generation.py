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
from icenet.core.data.tokenizer import Tokenizer
from icenet.core.errors import UsageError
from icenet.core.model import ModelFacts
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
    base = model.generation or GenerationConfig()
    values = base.model_dump()
    given = {key: value for key, value in options.items() if value is not None}
    if "max_length" in given and "max_new_tokens" not in given:
        values["max_new_tokens"] = None
    stop = given.get("stop", values["stop"])
    given["stop"] = [stop] if isinstance(stop, (str, int)) else list(stop)
    for key in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if isinstance(given.get(key), np.floating):
            given[key] = float(given[key])
    settings = GenerationConfig(**{**values, **given})

    tokens, visible = _prompts(input_ids, attention_mask, pad_token_id)
    _check_ids(tokens, model.config.vocab_size, visible)
    length = tokens.shape[1]
    window = getattr(model.config, "max_seq_length", None)
    if not getattr(model.config, "causal", True):
        raise UsageError("generate: this model sees the tokens to come (model.causal: false)")
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


def _prompts(
    input_ids: Any, attention_mask: Any, pad_token_id: int
) -> tuple[Tokens, NDArray[np.bool_] | None]:
    """Prompts as int32 `[B, T]`, padded on the left, and the mask bool `[B, T]` of real tokens."""
    if isinstance(input_ids, Sequence) and input_ids and isinstance(input_ids[0], (Sequence, np.ndarray)):
        rows = [_integers(row) for row in input_ids]
        length = max(row.size for row in rows)
        tokens = np.full((len(rows), length), pad_token_id, np.int32)
        visible = np.zeros((len(rows), length), np.bool_)
        for index, row in enumerate(rows):
            if row.ndim != 1 or row.size == 0:
                raise UsageError(f"generate: prompt {index} is empty; give at least one token")
            tokens[index, length - row.size :] = row
            visible[index, length - row.size :] = True
    else:
        tokens = _integers(input_ids)
        tokens = tokens[None, :] if tokens.ndim == 1 else tokens
        if tokens.ndim != 2 or tokens.size == 0:
            raise UsageError(f"generate: input_ids must be [batch, length], not {list(tokens.shape)}")
        visible = np.ones(tokens.shape, np.bool_)
    if attention_mask is not None:
        mask = _numpy(attention_mask).astype(np.bool_)
        if mask.shape != tokens.shape:
            raise UsageError(
                f"generate: attention_mask is {list(mask.shape)} where input_ids is {list(tokens.shape)}"
            )
        visible = visible & mask
        if not visible[:, -1].all():
            raise UsageError("generate: a prompt ends in padding; pad on the left")
    return tokens, None if visible.all() else visible


def _numpy(array: Any) -> NDArray[Any]:
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)


def _integers(array: Any) -> NDArray[Any]:
    values = _numpy(array)
    if values.size and not np.issubdtype(values.dtype, np.integer):
        raise UsageError(f"generate: token ids must be integers, not {values.dtype}")
    return values


def _check_ids(tokens: NDArray[Any], vocab_size: int, visible: NDArray[np.bool_] | None) -> None:
    """MLX reads past a table without a word, so ids are checked here."""
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise UsageError(
            f"generate: token {int(tokens[row, column])} at row {row}, position {column} is outside the "
            f"vocabulary (0 to {vocab_size - 1})"
        )


def stream(decoder: Decoder, request: Request, stops: Stops | None = None) -> Generator[Tokens, None, None]:
    """Yields the next tokens of every row, int32 `[B]`; rows that have ended hold padding.

    Ends when every row has, or after `request.new_tokens`. What a stop text begins with has been yielded
    before the stop is known.
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


def text_pieces(tokens: Iterator[Tokens], tokenizer: Tokenizer, stop: Sequence[int | str]) -> Iterator[str]:
    """The text of the first row piece by piece, as a person reads it.

    Held back until they are certain: the bytes of an unfinished character, and what may be the beginning of
    a stop text.
    """
    texts = [item for item in stop if isinstance(item, str)]
    ids: list[int] = []
    shown = 0
    for chosen in tokens:
        ids.append(int(chosen[0]))
        text = tokenizer.decode(ids)
        safe = len(text.rstrip("\ufffd"))
        for ending in texts:
            begun = next((n for n in range(len(ending) - 1, 0, -1) if text.endswith(ending[:n])), 0)
            safe = min(safe, len(text) - begun)
        if safe > shown:
            yield text[shown:safe]
            shown = safe
    rest = tokenizer.decode(ids)
    cut = min([at for ending in texts if (at := rest.find(ending)) >= 0], default=len(rest))
    if cut > shown:
        yield rest[shown:cut]
