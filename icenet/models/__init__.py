"""The model families, MLX. A new family adds its line to the imports and to `MODELS`."""

from __future__ import annotations

from collections.abc import Callable

from icenet.models.base import BaseModel
from icenet.models.transformer import TransformerModel

MODELS: dict[str, Callable[..., BaseModel]] = {"transformer": TransformerModel}

__all__ = ["MODELS", "BaseModel", "TransformerModel"]
