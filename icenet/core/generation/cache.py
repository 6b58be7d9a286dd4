"""The cache of a recurrent model: the states after the tokens read so far. It needs no framework."""

from __future__ import annotations

from typing import Any


class RecurrentCache:
    """The state of each recurrent layer after the last token; None before the first one."""

    def __init__(self) -> None:
        self.states: list[tuple[Any, ...]] | None = None
