"""A generation request: prompts and settings, checked."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.config import GenerationConfig
from icenet.core.errors import UsageError
from icenet.core.generation.prompts import batch_of
from icenet.core.generation.sampling import draw_keys
from icenet.core.models.base import ModelBase
from icenet.core.tokenizers.base import Tokenizer

Tokens = NDArray[np.int32]
DEFAULT_NEW_TOKENS = 100


@dataclass(frozen=True)
class Request:
    """A checked request: prompts `[B, T]`, which of their positions are real, and the settings."""

    tokens: Tokens
    attention_mask: NDArray[np.bool_] | None
    settings: GenerationConfig
    new_tokens: int
    context_length: int | None
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
            seen[row, tokens if self.attention_mask is None else tokens[self.attention_mask[row]]] = True
        return seen


def check_reads_tokens(model: ModelBase) -> None:
    """Refuses a model that has no text to continue."""
    if model.config.input_kind not in ("tokens", "anything"):
        raise UsageError(
            f"generate: a model of type {model.config.type} reads {model.config.input_kind} and continues no text; "
            "icenet predict classifies images"
        )


def request(
    model: ModelBase,
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
    context_length = getattr(model.config, "max_seq_length", None)
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
        if context_length is not None and settings.overflow == "error":
            new_tokens = max(1, min(new_tokens, context_length - length))
    if context_length is not None and length + new_tokens > context_length and settings.overflow == "error":
        raise UsageError(
            f"generate: a prompt of {length} tokens and {new_tokens} new ones exceed model.max_seq_length "
            f"{context_length}; ask for fewer, or pass overflow='slide' to forget the oldest tokens"
        )
    if any(isinstance(item, str) for item in settings.stop) and model.tokenizer is None:
        raise UsageError("generate: stop texts need a model with a tokenizer; give stop tokens")
    if "" in settings.stop:
        raise UsageError("generate: an empty stop text would end every text")
    seed = settings.seed if settings.seed is not None else 0
    return Request(tokens, visible, settings, new_tokens, context_length, seed, pad_token_id, model.tokenizer)


def _plain(value: Any) -> Any:
    """numpy's scalars as Python's, which the configuration checks."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


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
