"""Where imported weights are from, which an export writes again. Files of weights have it in their metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import Self

from icenet.core.weights.files import FAMILY

TOKEN_IDS = "icenet_token_ids"
"""Key of the metadata for `Origin.token_ids`, as JSON."""
TOKENIZER = "icenet_tokenizer"
"""Key of the metadata for `Origin.tokenizer`."""


@dataclass(frozen=True)
class Origin:
    """The folder of Hugging Face or the GGUF file that weights were imported from.

    Attributes:
        family: Its `model_type`.
        token_ids: Ids of special tokens, such as `bos_token_id`, by key, for each of its files of settings by name.
        tokenizer: `data.tokenizer` of a run that trained the weights further; empty without one.
    """

    family: str
    token_ids: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokenizer: str = ""

    @classmethod
    def of(cls, weights: Any) -> Self | None:
        """Returns the origin of weights with metadata; None if they are not imported, or have no metadata."""
        metadata = getattr(weights, "metadata", {})
        if FAMILY not in metadata:
            return None
        try:
            token_ids = {
                str(name): {str(key): value for key, value in ids.items() if _is_ids(value)}
                for name, ids in json.loads(metadata.get(TOKEN_IDS, "{}")).items()
            }
        except (ValueError, TypeError, AttributeError, RecursionError):  # written by hand
            token_ids = {}
        return cls(metadata[FAMILY], token_ids, metadata.get(TOKENIZER, ""))

    def metadata(self) -> dict[str, str]:
        """Returns the metadata from which `of` returns the same."""
        found = {FAMILY: self.family}
        if self.token_ids:
            found[TOKEN_IDS] = json.dumps(self.token_ids, sort_keys=True)
        return found | ({TOKENIZER: self.tokenizer} if self.tokenizer else {})


def _is_ids(value: object) -> bool:
    """Returns whether a value is an id, a list of ids, or None."""
    return value is None or all(isinstance(item, int) for item in (value if isinstance(value, list) else [value]))
