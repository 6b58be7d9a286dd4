"""The configuration's section `generation`: how tokens are chosen."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from icenet.core.config.section import Section


class GenerationConfig(Section):
    """How tokens are chosen. `icenet.core.generation.sampling` says in which order the filters apply."""

    section: ClassVar[str] = "generation"

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens to add to the prompt."""
    max_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens in prompt and continuation together, when max_new_tokens is absent."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Logits are divided by it; 0 chooses the most likely token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Only the k most likely tokens; 0: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the most likely tokens whose probabilities add up to p."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Only tokens at least this share as likely as the most likely one."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Logits of tokens already there are divided by it when positive, multiplied when negative."""
    seed: int | None = None
    """Seed of the draws; the configuration's own when absent."""
    stop: list[int | str] = Field(default_factory=list)
    """Tokens and texts after which a sequence ends; they are not part of what is returned."""
    overflow: Literal["error", "slide"] = "error"
    """Beyond max_seq_length: refuse before any work, or forget the older half of the context."""
    prefill_chunk: Annotated[int, Field(ge=1)] = 512
    """Prompt tokens read in one forward pass."""
