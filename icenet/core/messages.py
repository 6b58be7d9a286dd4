"""Parts of messages that have one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

_MOST_CHARACTERS = 300
"""Of a line of an error: some libraries have whole programs in it."""
_options: dict[str, str] = {}
"""Of the command that runs. All threads have them: the library of tokenizers reads texts in a thread of its own."""


@contextlib.contextmanager
def options_of_command(names: Mapping[str, str]) -> Iterator[None]:
    """Messages name the options of a command while the context is open, in place of keys and keywords (`option`)."""
    before = dict(_options)
    _options.update(names)
    try:
        yield
    finally:
        _options.clear()
        _options.update(before)


def option(name: str) -> str:
    """Returns a key of a config or a keyword of Python in the words of the command that runs, if one does."""
    return _options.get(name, name)


def first_line(error: BaseException, default: str | None = None) -> str:
    """Returns the first line of an error's message that is not blank, at most 300 characters of it.

    Args:
        error: Any error, such as one of a library or of a user's code.
        default: What to return for an error without a message; None: the name of its class.
    """
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__ if default is None else default)[:_MOST_CHARACTERS]


def some(names: Iterable[object], count: int = 3, separator: str = ", ") -> str:
    """Returns the first names, and the number of the others: `a, b, c and 5 more`."""
    listed = [str(name) for name in names]
    more = f" and {len(listed) - count:,} more" if len(listed) > count else ""
    return separator.join(listed[:count]) + more
