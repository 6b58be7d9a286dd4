"""The section `embedding`: how the hidden states of a text become one vector."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from typing_extensions import Self

from icenet.core.config.section import Section

Pooling = Literal["cls", "max", "mean", "mean_sqrt_length", "weighted_mean", "last"]


def _to_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _mean() -> list[Pooling]:
    return ["mean"]


_NAMES = {"enum": list(get_args(Pooling)), "type": "string"}
_Poolings = Annotated[
    list[Pooling],
    BeforeValidator(_to_list),
    WithJsonSchema({"anyOf": [_NAMES, {"type": "array", "items": _NAMES}]}),
]


class EmbeddingConfig(Section):
    """Options of `icenet.embed`. `icenet.core.embedding.pooling` has the formulas."""

    section: ClassVar[str] = "embedding"

    pooling: _Poolings = Field(default_factory=_mean)
    """How tokens become one vector: cls (the first), max, mean, mean_sqrt_length, weighted_mean, last. Several are
    concatenated; none: the model gives no embeddings."""
    dense: list[str] = Field(default_factory=list)
    """Folders of layers after the pooling, in this order: `Dense` of sentence-transformers."""
    normalize: bool = False
    """Divide each vector by its length."""
    max_seq_length: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """Number of tokens after which a text is cut, special ones included; null: that of the model."""
    lower_case: bool = False
    """Convert texts to lower case first."""
    prompts: dict[str, str] = Field(default_factory=dict)
    """Texts to put in front of each text, by name."""
    prompt_name: str | None = None
    """Which of prompts is put in front of each text; null: none."""
    prompt: str | None = None
    """Text to put in front of each text, instead of one of prompts."""
    include_prompt: bool = True
    """Whether the tokens of the prompt are pooled too."""

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if self.prompt is None and self.prompt_name is not None and self.prompt_name not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise ValueError(f"prompt_name {self.prompt_name!r} is not one of the prompts: {known}")
        return self
