"""Overrides of `--set` that a command replaces by an option or by a value of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from icenet.core.config import yaml_file


def warn_of_replaced(overrides: Sequence[str], replaced: Mapping[str, str | None]) -> None:
    """Logs a warning for each key that `--set` gives and that a command replaces.

    Args:
        overrides: `KEY=VALUE` settings.
        replaced: By key, what replaces it: an option and its value, or a clause. None: nothing does.
    """
    given: dict[str, Any] = {}
    for override in overrides:
        yaml_file.assign(given, *yaml_file.parse_override(override))
    for key, reason in replaced.items():
        if reason is None:
            continue
        _, is_new = yaml_file.assign(given, tuple(key.split(".")), "")
        if not is_new:
            reason = f"{reason} replaces it" if reason.startswith("--") else reason
            logging.getLogger("icenet").warning(f"--set {key}: has no effect: {reason}")


def option(name: str, value: str | None) -> str | None:
    """Returns an option as it was given, `--backend torch`; None if it was not."""
    return None if value is None else f"{name} {value}"
