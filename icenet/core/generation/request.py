"""A generation request: prompts and settings, checked before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from icenet.core.config import GenerationConfig, ModelConfig
from icenet.core.errors import NonFiniteError, UsageError
from icenet.core.generation.prompts import batch_of
from icenet.core.generation.sampling import draw_keys
from icenet.core.generation.stopping import StoppingCriteria
from icenet.core.messages import option
from icenet.core.tokenizers.base import Tokenizer, end_ids

Tokens = NDArray[np.int32]
SLIDE = "overflow='slide'"
"""The option that drops the oldest tokens, in messages."""
DEFAULT_NEW_TOKENS = 100
PREFILL_TOKENS = 8192
"""Number of tokens, padding included, of the prompts that are read together. It bounds the memory."""
SMALLEST_PASS = 512
"""Number of columns of the prompts that a GPU reads in one pass at least."""


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
        limits: Maximum number of new tokens of each row.
        context_length: Number of tokens that the model can attend to; None without a limit.
        seed: Seed of the draws.
        pad_token_id: Token that fills rows that have ended.
        tokenizer: Tokenizer of the model, if any.
        end_ids: End-of-text tokens, which end a row.
        numbers: Number of each row, on which its draws depend; None if they are 0, 1, ...
    """

    tokens: Tokens
    attention_mask: NDArray[np.bool_] | None
    settings: GenerationConfig
    limits: tuple[int, ...]
    context_length: int | None
    seed: int
    pad_token_id: int
    tokenizer: Tokenizer | None
    end_ids: tuple[int, ...] = ()
    numbers: tuple[int, ...] | None = None

    @property
    def new_tokens(self) -> int:
        """Maximum number of new tokens of the batch."""
        return max(self.limits)

    def rows(self) -> list[Tokens]:
        """Returns the prompts without padding, int32 `[T]` each."""
        masks = [None] * len(self.tokens) if self.attention_mask is None else self.attention_mask
        return [row if mask is None else row[mask] for row, mask in zip(self.tokens, masks, strict=True)]

    def prefill_columns(self, rows: int, model: Any) -> int:
        """Returns how many columns of prompts are read in one forward pass. A GPU computes many tokens at a time.

        Args:
            rows: Number of prompts that are read together.
            model: The model that reads them.
        """
        if self.settings.prefill_chunk is not None:
            return self.settings.prefill_chunk
        columns: int = model.cpu_prefill_columns if model.is_on_cpu else max(SMALLEST_PASS, PREFILL_TOKENS // rows)
        return columns

    def select(self, rows: Sequence[int]) -> Request:
        """Returns the request for some of the rows. Their tokens are the same as in this one."""
        index = np.array(rows)
        return replace(
            self,
            tokens=self.tokens[index],
            attention_mask=None if self.attention_mask is None else self.attention_mask[index],
            limits=tuple(self.limits[row] for row in rows),
            numbers=tuple(rows if self.numbers is None else (self.numbers[row] for row in rows)),
        )

    def keys(self, first: int | Sequence[int], count: int) -> NDArray[np.uint32] | None:
        """Returns the keys of draws `first`, `first + 1`, ..., uint32 `[count, B, 2]`; None at temperature 0.

        Args:
            first: Index of the first draw, or that of each row.
            count: Number of draws of each row.
        """
        if self.settings.temperature == 0:
            return None
        return draw_keys(self.seed, self.numbers or len(self.tokens), count, first)

    def seen(self, vocab_size: int) -> NDArray[np.bool_] | None:
        """Returns which tokens each prompt contains, bool `[B, V]`; None without a repetition penalty."""
        if self.settings.repetition_penalty == 1:
            return None
        seen = np.zeros((len(self.tokens), vocab_size), np.bool_)
        for row, tokens in enumerate(self.rows()):
            seen[row, tokens] = True
        return seen

    def explain(self, error: NonFiniteError, model: Any, tokens: Sequence[Sequence[int]]) -> NonFiniteError:
        """Returns the error of a row whose logits are not finite, with its cause.

        Args:
            error: The error, which names the row.
            model: A `ModelBase`.
            tokens: New tokens of each row.

        Raises:
            NonFiniteError: The vector of a token of a row is not finite.
        """
        for row, new in zip(self.rows(), tokens, strict=True):
            model.check_embeddings([*row.tolist(), *new])
        return NonFiniteError(f"{error}: {model.explain_non_finite()}")

    def stopping_criteria(self) -> StoppingCriteria:
        """Returns new stopping criteria for the rows of this request."""
        return StoppingCriteria(
            len(self.tokens),
            self.settings.stop,
            self.tokenizer,
            self.pad_token_id,
            end_ids=self.end_ids,
            limits=self.limits,
            numbers=self.numbers,
        )


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
    settings = settings_of(model, options)
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
    lengths = [tokens.shape[1]] * len(tokens) if mask is None else mask.sum(axis=1).tolist()
    limits = tuple(_new_tokens(settings, length, context_length) for length in lengths)
    ends = _end_ids(settings, vocab_size, model.tokenizer)
    seed = settings.seed if settings.seed is not None else 0
    return Request(tokens, mask, settings, limits, context_length, seed, pad_token_id, model.tokenizer, ends)


def settings_of(model: LanguageModel, options: Mapping[str, Any]) -> GenerationConfig:
    """Returns the settings of a model with the options that are not None."""
    base = model.generation or GenerationConfig()
    given = {key: _to_python(value) for key, value in options.items() if value is not None}
    if "stop" in given and not isinstance(given["stop"], list):
        given["stop"] = [given["stop"]]
    values = base.model_dump()
    if "max_length" in given:
        values["max_new_tokens"] = None
    return GenerationConfig(**{**values, **given})


def _to_python(value: Any) -> Any:
    """Converts numpy's numbers and arrays to those of Python, which the configuration accepts."""
    if isinstance(value, (list, tuple)):
        return [_to_python(item) for item in value]
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def _end_ids(settings: GenerationConfig, vocab_size: int, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Returns the tokens that end a text."""
    chosen = settings.eos_token_id
    for token in chosen or ():
        if not 0 <= token < vocab_size:
            raise UsageError(f"generate: eos_token_id {token} is outside the vocabulary (0 to {vocab_size - 1})")
    if settings.ignore_eos:
        return ()
    if chosen is None and tokenizer is not None:
        return tuple(token for token in end_ids(tokenizer) if token < vocab_size)
    return tuple(chosen or ())


def _check_stops(stops: list[int | str], vocab_size: int, tokenizer: Tokenizer | None) -> None:
    for stop in stops:
        if isinstance(stop, int) and not 0 <= stop < vocab_size:
            raise UsageError(f"generate: stop token {stop} is outside the vocabulary (0 to {vocab_size - 1})")
        if isinstance(stop, str) and not stop.isascii() and any("\ud800" <= char <= "\udfff" for char in stop):
            raise UsageError(f"generate: the stop text {stop!r} is not valid UTF-8, so no text contains it")
    if tokenizer is None and any(isinstance(stop, str) for stop in stops):
        raise UsageError("generate: stop texts need a model with a tokenizer; pass stop tokens")
    if "" in stops:
        raise UsageError("generate: a stop text is empty; it would end every row at once")


def _new_tokens(settings: GenerationConfig, length: int, context_length: int | None) -> int:
    """Returns the maximum number of new tokens after a prompt of `length` tokens."""
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
            f"request fewer tokens, or pass {option(SLIDE)} to drop the oldest ones"
        )
    return count
