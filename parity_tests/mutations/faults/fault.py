"""A planted fault."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A small, plausible mistake in a file: `old` is replaced by `new`.

    Attributes:
        name: The mistake in words.
        old: Text that occurs exactly once in the file.
        new: Its replacement.
        tests: Tests that must fail, below `parity_tests/`.
    """

    name: str
    old: str
    new: str
    tests: list[str]
