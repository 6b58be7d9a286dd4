"""The turns of a loop of the original, which an export writes one after another, as a loop."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TypeAlias

from icenet.core.porting.source.counters import range_of, turn_of, words_of_counter
from icenet.core.porting.source.lines import Line
from icenet.core.porting.source.originals import appended_to
from icenet.core.porting.source.words import Statement, meaning_of, statement_of

LONGEST = 40
"""The number of statements of the longest turn."""

_COUNTERS = ("step", "i", "index", "turn")
_Definition: TypeAlias = "tuple[int, int, int]"
"""A variable as a turn sets it: the turn, the statement, and the place among its targets."""


@dataclass
class Turns:
    """Statements that repeat.

    Attributes:
        index, size, count: Where the first turn begins, the statements of a turn, and the number of turns.
        rows: Each statement of each turn; None where the last turn lacks one, whose result nothing reads.
        end: Where the statements after the loop begin.
    """

    index: int
    size: int
    count: int
    rows: list[list[Statement | None]]
    end: int


@dataclass
class Loop:
    """A loop: the statements before it, its `for`, its statements, and those after it."""

    before: list[Line]
    head: Line
    body: list[Line]
    after: list[Line]
    start: int
    count: int
    step: int
    """What a turn adds to the counter."""


def turns(lines: list[Line], index: int, names: dict[str, str]) -> Loop | None:
    """Returns statements with a loop in the place of turns that begin at one of them.

    Args:
        lines: The statements of a body.
        index: The first statement of the first turn.
        names: The variables that hold the lists of the original, by their texts.
    """
    statements = [statement_of(line.code, line.depth) for line in lines]
    candidates = [
        found for size in range(1, LONGEST + 1) for found in [_repeated(lines, statements, index, size)] if found
    ]
    for found in sorted(candidates, key=lambda item: item.index - item.end):
        loop = _Loop(lines, statements, found, names)
        for rule in (0, 1, -1):
            made = loop.written(rule)
            if made is not None:
                return made
    return None


def _repeated(lines: list[Line], statements: list[Statement], index: int, size: int) -> Turns | None:
    """Returns the turns of a size that begin at a statement."""
    block = statements[index : index + size]
    if any(line.code.endswith(":") or line.code.startswith("return") for line in lines[index : index + size]):
        return None
    if len(block) < size:
        return None
    count = 1

    def same(one: int, other: int) -> bool:
        return statements[one].form == statements[other].form and lines[one].origin == lines[other].origin

    while index + size * (count + 1) <= len(lines) and all(
        same(index + number, index + size * count + number) for number in range(size)
    ):
        count += 1
    end = index + size * count
    rows: list[list[Statement | None]] = [
        list(statements[index + size * turn : index + size * (turn + 1)]) for turn in range(count)
    ]
    last: list[Statement | None] = []
    at = end
    for number in range(size):  # nothing reads what the last turn leaves out
        is_there = at < len(lines) and lines[at].origin is not None and same(index + number, at)
        last.append(statements[at] if is_there else None)
        at += is_there
    left_out = [number for number, statement in enumerate(last) if statement is None]
    # a number that rises may be an index, which would be beyond the end
    numbers = [[statement.numbers if statement is not None else [] for statement in row] for row in rows]
    is_same = all(row[number] == block[number].numbers for row in numbers for number in left_out)
    if count > 1 and 2 * (at - end) >= size and is_same:
        rows.append(last)
        count, end = count + 1, at
    if count < 2 or (count == 2 and (size < 3 or lines[index].origin is None)):
        return None
    return Turns(index, size, count, rows, end)


class _Loop:
    """The loop of some turns."""

    def __init__(self, lines: list[Line], statements: list[Statement], found: Turns, names: dict[str, str]) -> None:
        self.lines, self.statements, self.found, self.names = lines, statements, found, names
        self.used = {word for statement in statements for word in statement.words}
        self.step = 1
        """What a turn adds to the numbers that rise; -1 if they fall."""
        self.carried: dict[tuple[int, int], str] = {}
        """The variables that a turn takes from the one before, and those that the first one reads."""
        self.earlier: dict[tuple[int, int], str] = {}
        """What the first turn reads in the place of the values of two turns before."""
        self.older: set[tuple[int, int]] = set()
        """The places that read the value that a variable had before its last one."""
        self.last: dict[tuple[int, int], str] = {}
        """The variables that hold these values."""

    def written(self, rule: int) -> Loop | None:
        """Returns the statements with the loop.

        Args:
            rule: The turn whose variables the loop has.
        """
        found = self.found
        self.carried, self.earlier, self.older = {}, {}, set()
        sources = self.sources()
        numbers = self.numbers()
        if sources is None or numbers is None:
            return None
        rows = found.rows if found.rows[-1].count(None) == 0 else found.rows[:-1]
        variables = {
            (number, place): statement.words[target]
            for number, statement in enumerate(rows[min(rule, len(rows) - 1)])
            if statement is not None
            for place, target in enumerate(statement.targets)
        }
        if not self.with_older(variables, sources):
            return None
        after, lists = self.after(variables)
        if after is None:
            return None
        counter = next((name for name in _COUNTERS if name not in self.used), None)
        start = Counter(numbers.values()).most_common(1)[0][0] if numbers else 0
        step = self.step
        if counter is None or (step < 0 and start < found.count - 1):
            return None
        body = []
        for number, statement in enumerate(rows[0]):
            assert statement is not None
            words = {target: variables[number, place] for place, target in enumerate(statement.targets)}
            words |= self.words_read(number, statement, variables, sources)
            words |= words_of_counter(number, statement, numbers, counter, start)
            line = self.lines[found.index + number]
            comments = {self.lines[found.index + found.size * turn + number].comment for turn in range(len(rows))}
            comment = line.comment if len(comments) == 1 else ""
            code = statement.put(words)
            if (number, 0) in self.last:
                target, _, value = code.partition(" = ")
                code = f"{self.last[number, 0]}, {target} = {target}, {value}"
            body.append(Line(code, comment, line.depth + 1, line.origin))
            appended = [(number, place) for place in range(len(statement.targets)) if (number, place) in lists]
            body += [Line(f"{lists[key][0]}.append({variables[key]})", "", line.depth + 1) for key in appended]
        depth = self.lines[found.index].depth
        before, entries = self.entries(variables)
        entries += [f"{name} = {self.earlier[key]}" for key, name in self.last.items() if self.is_set(key, name)]
        entries += [f"{name} = [{first}]" for name, first in lists.values()]
        head = f"for {counter if numbers else '_'} in {range_of(start, found.count, step)}:"
        before += [Line(code, "", depth) for code in entries]
        flat = [*before]
        for turn in range(found.count):
            flat += turn_of(body, counter, start + step * turn)
        if meaning_of([*flat, *after]) != meaning_of(self.lines):
            return None
        return Loop(before, Line(head, "", depth), body, after, start, found.count, step)

    def words_read(
        self,
        number: int,
        statement: Statement,
        variables: dict[tuple[int, int], str],
        sources: dict[tuple[int, int], str | tuple[int, int]],
    ) -> dict[int, str]:
        """Returns the variables that a statement of the loop reads, by their places."""
        words = {}
        for place in statement.reads:
            source = sources[number, place]
            held = self.last if (number, place) in self.older else variables
            words[place] = held[source] if isinstance(source, tuple) else source
        return words

    def sources(self) -> dict[tuple[int, int], str | tuple[int, int]] | None:
        """Returns what each statement of a turn reads: a variable from outside, or one that a statement sets.

        None if the turns differ in it.
        """
        found = self.found
        defined: dict[str, _Definition] = {}
        read: dict[tuple[int, int], dict[int, str | _Definition]] = {}
        for turn, row in enumerate(found.rows):
            for number, statement in enumerate(row):
                for place in statement.reads if statement is not None else ():
                    name = statement.words[place]  # type: ignore[union-attr]
                    read.setdefault((number, place), {})[turn] = defined.get(name) or name
                for place, target in enumerate(statement.targets if statement is not None else ()):
                    defined[statement.words[target]] = (turn, number, place)  # type: ignore[union-attr]
        sources: dict[tuple[int, int], str | tuple[int, int]] = {}
        for (number, place), turns_ in read.items():
            last = max(turns_)
            source = turns_[last]
            if isinstance(source, str):
                if any(other != source for other in turns_.values()):
                    return None
                sources[number, place] = source
                continue
            key, distance = source[1:], last - source[0]
            age = distance - (number <= key[0])
            if age > 1:
                return None
            for turn, other in turns_.items():
                if turn >= distance:
                    if other != (turn - distance, *key):
                        return None
                    continue
                entries = self.carried if turn == distance - 1 else self.earlier
                if not isinstance(other, str) or entries.setdefault(key, other) != other:
                    return None
            sources[number, place] = key
            if age:
                self.older.add((number, place))
        return sources

    def with_older(
        self,
        variables: dict[tuple[int, int], str],
        sources: dict[tuple[int, int], str | tuple[int, int]],
    ) -> bool:
        """Names the values that variables had before their last ones, as in `a, b = b, a + b`.

        Returns:
            Whether they can have names.
        """
        self.last = {}
        outside = {source for source in sources.values() if isinstance(source, str)}
        later = {word for statement in self.statements[self.found.end :] for word in statement.words}
        for key in sorted({source for place in self.older if isinstance(source := sources[place], tuple)}):
            statement = self.found.rows[0][key[0]]
            if statement is None or len(statement.targets) != 1:
                return False
            entry = self.carried.get(key, "")
            if entry and entry not in outside | later | {*variables.values()}:
                variables[key] = entry
            name = self.earlier.get(key, "")
            if not name or name in outside | later | {*variables.values()}:
                name = f"last_{variables[key]}"
                if name in self.used:
                    return False
            if name in self.last.values():
                return False
            self.last[key] = name
        return True

    def is_set(self, key: tuple[int, int], name: str) -> bool:
        """Returns whether the variable of an earlier value has to be set before the loop."""
        return key in self.earlier and self.earlier[key] != name

    def numbers(self) -> dict[tuple[int, int], int] | None:
        """Returns the first value of each number that rises in the turns, or of each that falls.

        None if one changes in another way.
        """
        rising = {}
        steps = set()
        for number, first in enumerate(self.found.rows[0]):
            assert first is not None
            for place, word in enumerate(first.words):
                if not word.isdigit():
                    continue
                values = [int(row[number].words[place]) for row in self.found.rows if row[number] is not None]  # type: ignore[union-attr]
                step = values[1] - values[0] if len(values) > 1 else 1
                if step >= -1 and step and values == [int(word) + step * turn for turn in range(len(values))]:
                    steps.add(step)
                    around = (first.words[place - 1 : place] or [""])[0] + (
                        first.words[place + 1 : place + 2] or [""]
                    )[0]
                    # beyond one, a number is the index of a list
                    if not re.fullmatch(r"[\[(:\s,][\]):,]" if step < 2 else r"\[\]", around):
                        return None
                    rising[number, place] = int(word)
                elif len(set(values)) > 1:
                    return None
        self.step = steps.pop() if steps else 1
        return None if steps else rising

    def after(
        self, variables: dict[tuple[int, int], str]
    ) -> tuple[list[Line] | None, dict[tuple[int, int], tuple[str, str]]]:
        """Returns the statements after the loop, and the lists of all turns' values with their first elements."""
        found = self.found
        defined: dict[str, _Definition] = {}
        for turn, row in enumerate(found.rows):
            for number, statement in enumerate(row):
                for place, target in enumerate(statement.targets if statement is not None else ()):
                    defined[statement.words[target]] = (turn, number, place)  # type: ignore[union-attr]
        stacks = self.stacks(dict(defined), variables)
        lists: dict[tuple[int, int], tuple[str, str]] = {key: (name, "") for key, name in stacks.items()}
        lines = []
        for index in range(found.end, len(self.lines)):
            statement, line = self.statements[index], self.lines[index]
            words: dict[int, str] = {}
            for place in statement.reads:
                source = defined.get(statement.words[place])
                if source is None or place in words:
                    continue
                turn, key = source[0], source[1:]
                if key in stacks:
                    words[place] = f"{stacks[key]}.pop()"
                    continue
                if key in self.last and turn == found.count - 2:
                    words[place] = self.last[key]
                elif turn == 0 and found.count > 1:
                    others = {name for other, (name, _) in lists.items() if other != key}
                    made = self.listed(statement, place, key, defined, variables[key], others)
                    if made is None or lists.setdefault(key, made[:2]) != made[:2]:
                        return None, {}
                    words.update(made[2])
                elif key in variables:
                    words[place] = variables[key]
            for target in statement.targets:
                defined.pop(statement.words[target], None)
            lines.append(replace(line, code=statement.put(words)))
        return lines, lists

    def stacks(
        self, defined: dict[str, _Definition], variables: dict[tuple[int, int], str]
    ) -> dict[tuple[int, int], str]:
        """Returns names of lists for the values that later statements read in the opposite order, each once.

        The skips of a U-Net, for example.
        """
        found = self.found
        read: dict[tuple[int, int], list[int]] = {}
        places: dict[tuple[int, int], set[int]] = {}
        for index in range(found.end, len(self.lines)):
            statement = self.statements[index]
            for place in statement.reads:
                source = defined.get(statement.words[place])
                if source is not None:
                    read.setdefault(source[1:], []).append(source[0])
                    places.setdefault(source[1:], set()).add(index)
            for target in statement.targets:
                defined.pop(statement.words[target], None)
        stacks: dict[tuple[int, int], str] = {}
        for key, turns_ in read.items():
            is_opposite = turns_ == list(reversed(range(found.count))) and len(places[key]) == len(turns_)
            if not is_opposite or key not in variables:
                continue  # a list in one statement is a list
            origin = self.lines[found.index + key[0]].origin
            file, line = origin[-1] if origin else ("", 0)
            name = appended_to(file, line, variables[key]) or "skips"
            if name not in self.used and name not in stacks.values():
                stacks[key] = name
        return stacks

    def listed(
        self,
        statement: Statement,
        place: int,
        key: tuple[int, int],
        defined: dict[str, _Definition],
        variable: str,
        others: set[str],
    ) -> tuple[str, str, dict[int, str]] | None:
        """Returns the list of all turns' values, its first element, and the words of the statement that reads it."""
        words = statement.words
        start = place
        while start and words[start - 1] != "[":
            start -= 1
        end = place
        while end < len(words) and words[end] != "]":
            end += 1
        inner = words[start:end]
        elements = [word.strip() for word in "".join(inner).split(",")]
        before = "".join(words[start:place]).rstrip(", ")
        own = elements[len(before.split(",")) if before else 0 :]
        expected = [(turn, *key) for turn in range(self.found.count)]
        is_reversed = [defined.get(word) for word in elements] == expected[::-1]
        if not (is_reversed or [defined.get(word) for word in own] == expected) or start == 0:
            return None
        before = "" if is_reversed else before
        text = "".join(inner)
        taken = ({*self.used} - set(elements)) | others
        name = self.names.get(text, "")
        if not name or name == variable or name in others:
            name = f"{variable}{'es' if variable.endswith('s') else 's'}"
            name = f"all_{variable}" if name in taken else name
        changed = dict.fromkeys(range(start - 1, end + 1), "")
        changed[start - 1] = f"{name}[::-1]" if is_reversed else name
        return name, before, changed

    def entries(self, variables: dict[tuple[int, int], str]) -> tuple[list[Line], list[str]]:
        """Returns the statements before the loop, and those that set the variables that its first turn reads."""
        before = list(self.lines[: self.found.index])
        entries = []
        for key, name in self.carried.items():
            variable = variables[key]
            if name == variable:
                continue
            place = self.set_before(name, variable)
            if place is None:
                entries.append(f"{variable} = {name}")
            else:
                before[place] = replace(before[place], code=variable + before[place].code[len(name) :])
        return before, entries

    def set_before(self, name: str, variable: str) -> int | None:
        """Returns the statement that sets a variable only for the loop, so that it may have another name."""
        index = self.found.index
        for place in range(index - 1, max(index - 6, -1), -1):
            line, statement = self.lines[place], self.statements[place]
            if line.code.startswith(f"{name} = ") and line.depth == 0:
                read = [word for other in self.statements[self.found.end :] for word in other.words]
                return place if name not in read else None
            if line.depth or {name, variable} & {*statement.words}:
                return None
        return None
