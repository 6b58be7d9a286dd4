"""What a program passes in place of keys of the configuration. A checkpoint records that it was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from icenet.core.errors import UsageError


@dataclass(frozen=True)
class Given:
    """The objects; None for what the configuration determines."""

    data: Any = None
    loss: Callable[..., Any] | None = None

    def names(self) -> list[str]:
        return [name for name in ("data", "loss") if getattr(self, name) is not None]

    def notes(self) -> list[str]:
        keys = {"data": "the section data", "loss": "training.loss"}
        return [f"{name} is given in Python; {keys[name]} has no effect" for name in self.names()]

    def check(self, stored: Any, source: str) -> None:
        """Raises UsageError if a checkpoint was trained with something that is missing."""
        if missing := [name for name in stored or () if name in ("data", "loss") and name not in self.names()]:
            options = ", ".join(f"{name}=..." for name in missing)
            raise UsageError(
                f"{source}: was trained with {' and '.join(missing)} given in Python; continue it with "
                f"Trainer.resume(..., {options})"
            )
