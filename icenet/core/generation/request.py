"""A generation request: prompts and settings, checked before any work is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from icenet.core.config import GenerationConfig, ModelConfig
from icenet.core.errors import UsageError
from icenet.core.generation.prompts import batch_of
from icenet.core.generation.sampling import draw_keys
from icenet.core.generation.stopping import StoppingCriteria
from icenet.core.tokenizers.base import Tokenizer

Tokens = NDArray[np.int32]
DEFAULT_NEW_TOKENS = 100


class LanguageModel(Protocol):
    """The attributes of a model that a request reads (see `icenet.core.models.base.ModelBase`)."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def generation(self) -> GenerationConfig | None: ...


@dataclass(frozen=True)
class Request:
    """Checked prompts and settings.

    Attributes:
        tokens: Prompts, int32 `[B, T]`, padded on the left.
        attention_mask: bool `[B, T]`, False for padding; None without padding.
        settings: Sampling options.
        new_tokens: Maximum number of new tokens.
        context_length: Number of tokens that the model can attend to; None without a limit.
        seed: Seed of the draws.
        pad_token_id: Token that fills rows that have ended.
        tokenizer: Tokenizer of the model, if any.
    """

    tokens: Tokens
    attention_mask: NDArray[np.bool_] | None
    settings: GenerationConfig
    new_tokens: int
    context_length: int | None
    seed: int
    pad_token_id: int
    tokenizer: Tokenizer | None

    def keys(self) -> NDArray[np.uint32] | None:
        """Returns the key of each draw, uint32 `[new_tokens, B, 2]`; None at temperature 0."""
        if self.settings.temperature == 0:
            return None
        return draw_keys(self.seed, self.tokens.shape[0], self.new_tokens)

    def seen(self, vocab_size: int) -> NDArray[np.bool_] | None:
        """Returns which tokens each prompt contains, bool `[B, V]`; None without a repetition penalty."""
        if self.settings.repetition_penalty == 1:
            return None
        seen = np.zeros((self.tokens.shape[0], vocab_size), np.bool_)
        for row, tokens in enumerate(self.tokens):
            seen[row, tokens if self.attention_mask is None else tokens[self.attention_mask[row]]] = True
        return seen

    def stopping_criteria(self) -> StoppingCriteria:
        """Returns new stopping criteria for the rows of this request."""
        return StoppingCriteria(len(self.tokens), self.settings.stop, self.tokenizer, self.pad_token_id)


def check_reads_tokens(model: LanguageModel) -> None:
    """Raises UsageError if the model's input is not text."""
    if model.config.input_kind not in ("tokens", "anything"):
        raise UsageError(
            f"generate: a model of type {model.config.type} takes {model.config.input_kind}, not text; "
            "use icenet predict to classify images"
        )


def make_request(
    model: LanguageModel, input_ids: Any, attention_mask: Any, pad_token_id: int, options: Mapping[str, Any]
) -> Request:
    """Checks prompts and options, and combines the options with the model's own settings.

    Args:
        model: Model that will generate.
        input_ids: Prompts as token ids: `[B, T]`, `[T]`, or a list of lists of unequal length.
        attention_mask: `[B, T]`, 0 or False for padding, or None.
        pad_token_id: Token for padding.
        options: Keys of `GenerationConfig`. None selects the model's own setting.

    Raises:
        UsageError: A prompt or an option is invalid.
    """
    check_reads_tokens(model)
    settings = _settings(model.generation or GenerationConfig(), options)
    vocab_size = model.config.vocab_size
    tokens, mask = batch_of(input_ids, attention_mask, pad_token_id, vocab_size)
    if mask is not None and not hasattr(model, "make_cache"):
        raise UsageError("generate: this model takes no attention_mask; pass prompts of equal length")
    for name, value in (("causal", True), ("bidirectional", False)):
        if getattr(model.config, name, value) != value:
            raise UsageError(
                f"generate: this model attends to later tokens (model.{name}: {str(not value).lower()}); "
                f"generation needs model.{name}: {str(value).lower()}"
            )
    _check_stops(settings.stop, vocab_size, model.tokenizer)
    context_length = getattr(model.config, "max_seq_length", None)
    new_tokens = _new_tokens(settings, tokens.shape[1], context_length)
    seed = settings.seed if settings.seed is not None else 0
    return Request(tokens, mask, settings, new_tokens, context_length, seed, pad_token_id, model.tokenizer)


def _settings(base: GenerationConfig, options: Mapping[str, Any]) -> GenerationConfig:
    """Returns the base settings with the options that are not None."""
    given = {key: _to_python(value) for key, value in options.items() if value is not None}
    if "stop" in given and not isinstance(given["stop"], list):
        given["stop"] = [given["stop"]]
    values = base.model_dump()
    if "max_length" in given:
        values["max_new_tokens"] = None
    return GenerationConfig(**{**values, **given})


def _to_python(value: Any) -> Any:
    """Converts numpy scalars to Python numbers, which the configuration accepts."""
    if isinstance(value, (list, tuple)):
        return [_to_python(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _check_stops(stops: list[int | str], vocab_size: int, tokenizer: Tokenizer | None) -> None:
    for stop in stops:
        if isinstance(stop, int) and not 0 <= stop < vocab_size:
            raise UsageError(f"generate: stop token {stop} is outside the vocabulary (0 to {vocab_size - 1})")
    if tokenizer is None and any(isinstance(stop, str) for stop in stops):
        raise UsageError("generate: stop texts need a model with a tokenizer; pass stop tokens")
    if "" in stops:
        raise UsageError("generate: a stop text is empty; it would end every row at once")


def _new_tokens(settings: GenerationConfig, length: int, context_length: int | None) -> int:
    """Returns the maximum number of new tokens after prompts of `length` tokens."""
    limit = context_length if settings.overflow == "error" else None
    if settings.max_new_tokens is not None:
        count = settings.max_new_tokens
    elif settings.max_length is not None:
        count = settings.max_length - length
        if count < 1:
            raise UsageError(
                f"generate: max_length {settings.max_length} is not longer than the prompt of {length} tokens; "
                "increase it or use max_new_tokens"
            )
    else:
        count = DEFAULT_NEW_TOKENS if limit is None else max(1, min(DEFAULT_NEW_TOKENS, limit - length))
    if limit is not None and length + count > limit:
        raise UsageError(
            f"generate: a prompt of {length} tokens and {count} new tokens exceed model.max_seq_length {limit}; "
            "request fewer tokens, or pass overflow='slide' to drop the oldest ones"
        )
    return count
