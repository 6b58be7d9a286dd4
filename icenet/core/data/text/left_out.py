"""What a source leaves out: counts and the first names, for each reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Self

from icenet.core import listing

BINARY = "binary files, left out"
EMPTY = "empty files"
NOT_UTF8 = "files that are not UTF-8, left out"
DAMAGED = "damaged files, left out"
UNREADABLE = "files or folders that cannot be read, left out"
JSON_ARRAYS = "JSON arrays instead of JSON lines, left out"
BAD_LINES = "JSON lines without a text, left out"
EMPTY_LINES = "JSON lines with an empty text"
NO_TOKEN = "characters without a token, left out"
REPLACED = "invalid bytes replaced by U+FFFD"
LINKED_TWICE = "links to files or folders that are read once"
BROKEN_LINKS = "links to nothing"
RUNS = "folders of runs, left out"
SPECIAL = "devices, pipes and sockets, left out"
FOLDERS = "folders that match the pattern ('**/*' matches the files below)"

NEEDS_SKIP = frozenset({NOT_UTF8, DAMAGED, JSON_ARRAYS, UNREADABLE, BAD_LINES, NO_TOKEN})
"""Reasons that are errors unless `data.errors` is skip."""

OF_LISTING = {
    listing.LINKED_TWICE: LINKED_TWICE,
    listing.BROKEN_LINK: BROKEN_LINKS,
    listing.NOT_A_FILE: SPECIAL,
    listing.RUN: RUNS,
    listing.UNREADABLE: UNREADABLE,
}
"""The reasons of `icenet.core.listing`, for a text source."""

_KEPT = 20
_SHOWN = 3


class LeftOut:
    """Counts what a source leaves out, and keeps the first names.

    Attributes:
        counts: Number of files, lines, characters or bytes, by reason.
        names: The first names of each reason, with details.
    """

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        """Reads what `as_dict` returned; None: nothing is left out."""
        self.counts: dict[str, int] = {reason: int(count) for reason, (count, _) in (values or {}).items()}
        self.names: dict[str, list[str]] = {reason: list(names) for reason, (_, names) in (values or {}).items()}

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Adds a file, or a number of lines, characters or bytes in one place."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        names = self.names.setdefault(reason, [])
        if len(names) < _KEPT and name not in names:
            names.append(name)

    def remove(self, reason: str) -> None:
        """Forgets a reason."""
        self.counts.pop(reason, None)
        self.names.pop(reason, None)

    def is_allowed(self, errors: str) -> bool:
        """Returns whether nothing is left out that is an error with this value of `data.errors`."""
        return errors == "skip" or not NEEDS_SKIP & self.counts.keys()

    def copy(self) -> Self:
        """Returns a copy, which changes separately."""
        return type(self)(self.as_dict())

    def merged(self, other: LeftOut) -> Self:
        """Returns both together."""
        both = self.copy()
        for reason, count in other.counts.items():
            for index, name in enumerate(other.names[reason]):
                both.add(reason, name, 0 if index else count)
        return both

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON types."""
        return {reason: [count, list(self.names[reason])] for reason, count in self.counts.items()}

    def summary(self) -> str:
        """Returns one line, such as `binary files, left out: 2 (a.png, b.bin: NUL at byte 5)`; empty for nothing."""
        parts = []
        for reason, count in self.counts.items():
            shown = self.names[reason][:_SHOWN]
            more = ", ..." if len(shown) < len(self.names[reason]) else ""
            parts.append(f"{reason}: {count:,} ({', '.join(shown)}{more})")
        return "; ".join(parts)
