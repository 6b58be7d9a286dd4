"""The counter of a loop: its range, and the numbers of the statements that rise or fall with it."""

from __future__ import annotations

import re
from dataclasses import replace

from icenet.core.porting.source.lines import Line
from icenet.core.porting.source.words import Statement

_FACTORS = ("*", "/", "%", "@")
"""Operators next to which a sum needs parentheses."""


def range_of(start: int, count: int, step: int) -> str:
    """Returns the source of a number of steps, which begin at a number and rise, or fall by 1."""
    if step > 1:
        return f"range({start}, {start + step * count}, {step})"
    low = start if step > 0 else start - count + 1
    bounds = f"{low}, {low + count}" if low else str(count)
    return f"range({bounds})" if step > 0 else f"reversed(range({bounds}))"


def words_of_counter(
    number: int, statement: Statement, numbers: dict[tuple[int, int], int], counter: str, start: int
) -> dict[int, str]:
    """Returns what replaces the numbers of a statement that rise or fall: the counter, and a number added to it."""
    words = {}
    for place in range(len(statement.words)):
        first = numbers.get((number, place))
        if first is not None:
            before, after = "".join(statement.words[:place]), "".join(statement.words[place + 1 :])
            is_factor = before.rstrip()[-1:] in _FACTORS or after.lstrip()[:1] in _FACTORS
            more = start - first if before.endswith(" - ") and not is_factor else first - start
            text = f"{counter} {'-' if more < 0 else '+'} {abs(more)}" if more else counter
            words[place] = f"({text})" if more and is_factor else text
    return words


def turn_of(body: list[Line], counter: str, value: int) -> list[Line]:
    """Returns the statements of a loop with a number in the place of its counter."""

    def number(match: re.Match[str]) -> str:
        more = int((match[2] or "0").replace(" ", ""))
        return f"{match[1]}{value - more if match[1] else value + more}"

    factor = re.compile(rf"(?<![\w)\]])\({counter} ([+-] \d+)\)")
    codes = [factor.sub(lambda match: str(value + int(match[1].replace(" ", ""))), line.code) for line in body]
    codes = [re.sub(rf"( - |\b){counter}( [+-] \d+)?\b", number, code) for code in codes]
    return [replace(line, code=code) for line, code in zip(body, codes, strict=True)]
