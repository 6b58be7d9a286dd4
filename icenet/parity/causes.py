"""Known causes of differences, tried on the reference in memory."""

from __future__ import annotations

from typing import Any


def suggest(comparison: Any, pair: Any, judgements: Any) -> str:
    """Returns the cause that removes the difference of a call; empty if none does."""
    return ""


def suggest_update(comparison: Any, sequence: Any, updated: Any, optimizers: Any) -> str:
    """Returns the cause that removes the difference of the updates of an optimizer; empty if none does."""
    return ""
