"""The console of standard output, for tables and text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_UNLIMITED = 10_000


def new_console(**options: Any) -> Console:
    """Returns a console of standard output.

    In a file or a pipe, lines have their full length: rich would cut off names and wrap cells at the width of a
    terminal, or at 80 columns.

    Args:
        options: Those of `rich.console.Console`.
    """
    from rich.console import Console

    console = Console(**options)
    if not console.is_terminal and not console.is_jupyter:
        console.width = _UNLIMITED
    return console
