"""The consoles of standard output and standard error, for tables, text and progress bars.

They print texts literally: `[red]` and `:smile:` are no markup, and control characters are escaped.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from icenet.core.report.streams import Diagnostics, printable

if TYPE_CHECKING:
    from rich.console import Console

_UNLIMITED = 10_000
_MIN_WIDTH = 60
"""Columns below which a table would lose its cells; a narrower terminal wraps its lines."""


def new_console(**options: Any) -> Console:
    """Returns a console of standard output.

    In a file or a pipe, lines have their full length: rich would cut off names and wrap cells at the width of a
    terminal, or at 80 columns.

    Args:
        options: Those of `rich.console.Console`.
    """
    console: Console = _console_class()(**{"markup": False, "emoji": False, **options})
    if not console.is_terminal and not console.is_jupyter:
        console.width = _UNLIMITED
    elif console.width < _MIN_WIDTH:
        console.width = _MIN_WIDTH
    return console


def stderr_console() -> Console:
    """Returns a console of standard error. A line that cannot be written is dropped."""
    # with FORCE_COLOR, which CI sets for colors, rich would draw a bar to a file
    terminal = None if Diagnostics().isatty() else False
    file: Any = Diagnostics()
    return _console_class()(markup=False, emoji=False, file=file, force_terminal=terminal)


def print_line(console: Console, text: str) -> None:
    """Prints a plain line that is neither wrapped nor styled."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


@functools.cache
def _console_class() -> type[Console]:
    from rich.console import Console
    from rich.segment import Segment

    class LiteralConsole(Console):
        """A console whose texts contain no control characters."""

        def render_str(self, text: str, **options: Any) -> Any:  # type: ignore[override]
            return super().render_str(printable(text, multiline=True), **options)

        def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else printable(text, multiline=True), style, control)

    return LiteralConsole
