"""Parts of messages that have one line."""

from __future__ import annotations

from collections.abc import Iterable


def first_line(error: BaseException, limit: int = 300) -> str:
    """Returns the first line of an error's message that is not blank, or the name of its class without one.

    Args:
        error: Any error, such as one of a library or of a user's code.
        limit: Largest number of characters.
    """
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:limit]


def some(names: Iterable[object], count: int = 3, separator: str = ", ") -> str:
    """Returns the first names, and the number of the others: `a, b, c and 5 more`."""
    listed = [str(name) for name in names]
    more = f" and {len(listed) - count:,} more" if len(listed) > count else ""
    return separator.join(listed[:count]) + more
