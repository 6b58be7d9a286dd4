"""The metadata of a GGUF file about the architecture of its model."""

from __future__ import annotations

from typing import Any

from icenet.core.errors import ConfigError
from icenet.core.families.keys import shown
from icenet.core.weights.gguf import GgufFile

Values = dict[str, Any]
"""Values of a config.json."""


class Metadata:
    """The metadata of an architecture. Remembers which keys are used."""

    def __init__(self, file: GgufFile, name: str) -> None:
        self.file, self.name = file, name
        self.unused = {key.partition(".")[2] for key in file.metadata if key.startswith(f"{name}.")}

    def get(self, key: str, default: Any = None) -> Any:
        self.unused.discard(key)
        return self.file.metadata.get(f"{self.name}.{key}", default)

    def whole(self, key: str, default: int) -> int:
        """Returns a whole number above 0; 0 stands for the default."""
        value = self.get(key) or default
        if not isinstance(value, int) or not 0 < value < 2**31:
            raise ConfigError(f"{self.name}.{key}: {shown(value)} is not a whole number above 0")
        return value

    def number(self, key: str, default: float) -> float:
        """Returns a number above 0."""
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise ConfigError(f"{self.name}.{key}: {shown(value)} is not a number above 0")
        return float(value)
