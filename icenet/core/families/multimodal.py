"""Models of text and images, of which the text part is read: Gemma 3 from 4B on.

Sources: the classes `Gemma3Config` and `Gemma3ForConditionalGeneration` of Hugging Face's `transformers` 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from icenet.core.errors import ConfigError
from icenet.core.families.family import Family
from icenet.core.families.keys import Key, Options, Values, shown
from icenet.core.families.llama import GEMMA3
from icenet.core.families.tensors import Row


@dataclass(frozen=True)
class TextConfig:
    """`text_config`: the config.json of a text model within that of a larger one."""

    text: Family

    @property
    def keys(self) -> Sequence[str]:
        return ("text_config",)

    def read(self, values: Values) -> dict[str, Any]:
        content = values.get("text_config")
        if not isinstance(content, dict):
            raise ConfigError(f"text_config: {shown(content)} is not an object")
        try:
            return self.text.read(content, has_head=True)
        except ConfigError as error:
            raise ConfigError(f"text_config: {error}") from None

    def write(self, options: Options) -> dict[str, Any]:
        written: dict[str, Any] = {"model_type": self.text.model_type}
        for part in self.text.parts:
            written |= part.write(options)
        return {"text_config": written}


def _renamed(rows: Sequence[Row], old: str, new: str) -> list[Row]:
    return [replace(row, theirs=new + row.theirs.removeprefix(old)) for row in rows]


_BODY = [row for row in GEMMA3.rows if row.theirs.startswith("model.")]

GEMMA3_MULTIMODAL = Family(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    GEMMA3.fixed,
    [TextConfig(GEMMA3), Key("tie_word_embeddings", "tie_embeddings", True)],
    "language_model.",
    _renamed(GEMMA3.rows, "", "language_model."),
    head="language_model.lm_head.weight",
    # the names within transformers, which some programs write
    alternatives=[[*_renamed(_BODY, "model.", "model.language_model."), Row("lm_head", ["output"])]],
    unused=(r"(model\.)?vision_tower\..*", r"(model\.)?multi_modal_projector\..*"),
    ignored=frozenset(
        {
            *("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"),
            *("boi_token_id", "eoi_token_id", "image_token_id", "use_cache"),
        }
    ),
    divides_width=True,
    text_family=GEMMA3,
)
