"""The section `generation`: options of sampling."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from icenet.core.config.section import Section


def _to_list(value: object) -> object:
    return [value] if isinstance(value, int) else value


_TokenIds = Annotated[
    list[int],
    BeforeValidator(_to_list),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]}),
]


class GenerationConfig(Section):
    """Options of text generation. `icenet.core.generation.sampling` documents the order of the filters."""

    section: ClassVar[str] = "generation"
    any_magnitude: ClassVar[frozenset[str]] = frozenset({"temperature"})  # one near zero is greedy, as zero is

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of tokens to add to the prompt."""
    max_length: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of tokens of a prompt and its continuation, if max_new_tokens is null."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Divisor of the logits; 0: always the most likely token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Keep only the k most likely tokens; 0: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep only the most likely tokens with a total probability of p."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Keep only tokens with at least this fraction of the probability of the most likely one."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Divisor of positive logits, and factor of negative ones, of tokens that occurred before."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Seed of sampling; null: the seed of the configuration."""
    stop: list[int | str] = Field(default_factory=list)
    """Token ids and strings that end a sequence; they are not part of the result."""
    eos_token_id: _TokenIds | None = None
    """Token ids, or one id, that end a text; null: the tokenizer's end-of-text tokens. The result excludes them."""
    add_special_tokens: bool = False
    """Put the tokens around a prompt that the tokenizer puts around a text, such as a beginning-of-text token."""
    ignore_eos: bool = False
    """Continue after an end-of-text token."""
    overflow: Literal["error", "slide"] = "error"
    """Beyond max_seq_length: an error before any work, or slide: drop the older half of the row's context."""
    prefill_chunk: Annotated[int, Field(ge=1)] | None = None
    """Prompt tokens of a row per forward pass; null: 128 to 2048 on a CPU, up to 8192 of all rows on a GPU."""
    max_batch_size: Annotated[int, Field(ge=1)] = 64
    """Number of prompts that are decoded together; as rows end, others join. The cache grows with it."""
