"""Repeated statements as loops over the lists of a module."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

from icenet.core.porting.graph.calls import Item
from icenet.core.porting.record import WHOLE, Node
from icenet.core.porting.source.lines import Line

ELEMENT = re.compile(r"self[\w.\[\]'\"]*\[\d+\](\.\w+)?\(")
RANGE = re.compile(r"(self[^@\s]*)@(\d+):(\d+)@")
_INDEX = re.compile(r"(self(?:\.\w+|\[\"?'?\w+'?\"?\])*?)\[(\d+)\]")


def kind(item: Item) -> str:
    """Returns what an operation has in common with that of another turn of a loop."""
    if isinstance(item, Node) and item.op not in WHOLE:
        return item.op
    return re.sub(r"\.\d+(?=\.|$)", ".#", item.args["path"] if isinstance(item, Node) else item.path)


def roll(lines: list[Line]) -> list[Line]:
    """Writes repeated statements that differ in the index of a list as a loop."""
    index = 0
    while index < len(lines):
        best = None
        for size in range(1, min(24, (len(lines) - index) // 2) + 1):
            found = _run(lines, index, size)
            if found is not None and (best is None or found[0] * size > best[0] * best[1]):
                best = (*found[:1], size, *found[1:])
        if best is None:
            turns = _turns(lines, index)
            if turns is None:
                index += 1
                continue
            lines = [*lines[:index], *turns[0], *lines[index + turns[1] :]]
            index += len(turns[0])
            continue
        count, size, lists, start, entry, turn = best
        block = lines[index : index + size]
        if entry:
            block = [replace(line, code=code) for line, code in zip(block, turn, strict=True)]
        names = [_singular(text) for text in lists]
        names = [name if names.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(names)]
        inner = []
        for line in block:
            code = line.code
            for text, name in zip(lists, names, strict=True):
                code = code.replace(f"{text}[{start}]", name)
            inner.append(Line(code, line.comment, line.depth + 1))
        ranges = [f"{text}@{start}:{start + count}@" for text in lists]
        head = f"for {', '.join(names)} in " + (ranges[0] if len(ranges) == 1 else f"zip({', '.join(ranges)})") + ":"
        before = [Line(f"{entry[1]} = {entry[0]}", "", block[0].depth)] if entry else []
        after = lines[index + size * count :]
        lines = [*lines[:index], *before, Line(head, "", block[0].depth), *inner, *after]
        index += len(before) + size + 1
    return lines


_STEP = re.compile(r"(self(?:\.\w+|\[\"?'?\w+'?\"?\])*?)\[step\]")
_INTEGER = re.compile(r"(?<![\w.'\"])\d+(?![\w.'\"])")
"""A number that may rise in a loop, not the name of a layer such as `self["4"]`."""


def _turns(lines: list[Line], index: int) -> tuple[list[Line], int] | None:
    """Returns a loop in the place of statements that repeat with an index that rises, and their number."""
    for size in range(1, min(12, (len(lines) - index) // 3) + 1):
        block = lines[index : index + size]
        if any(line.code.endswith(":") or line.code.startswith("return") for line in block):
            return None
        count, rising = 1, None
        while True:
            turn = lines[index + size * count : index + size * (count + 1)]
            found = _rise(block, turn, count)
            if found is None or (rising is not None and found != rising):
                break
            count, rising = count + 1, found
        if count < 3 or rising is None:
            continue
        starts = {_numbers(block)[place] for place in rising}
        if len(starts) > 1:
            continue
        start = starts.pop() if starts else 0
        places = itertools.count()
        put = functools.partial(_put, places, rising)
        inner = [Line(_INTEGER.sub(put, line.code), line.comment, line.depth + 1) for line in block]
        bounds = f"{start}, {start + count}" if start else str(count)
        head = Line(f"for {'step' if rising else '_'} in range({bounds}):", "", block[0].depth)
        if start == 0:
            head, inner = _enumerated(head, inner, count)
        return [head, *inner], size * count
    return None


def _enumerated(head: Line, inner: list[Line], count: int) -> tuple[Line, list[Line]]:
    """Writes a loop over the steps as one over the list of which it takes the element of each step."""
    lists = {match[1] for line in inner for match in _STEP.finditer(line.code)}
    if len(lists) != 1:
        return head, inner
    text = lists.pop()
    name = _singular(text)
    used = {word for line in inner for word in re.findall(r"\w+", line.code)}
    if name in used:
        return head, inner
    inner = [replace(line, code=line.code.replace(f"{text}[step]", name)) for line in inner]
    if any(re.search(r"\bstep\b", line.code) for line in inner):
        return replace(head, code=f"for step, {name} in enumerate({text}@0:{count}@):"), inner
    return replace(head, code=f"for {name} in {text}@0:{count}@:"), inner


def _put(places: Iterator[int], rising: set[int], match: re.Match[str]) -> str:
    return "step" if next(places) in rising else match[0]


def _numbers(lines: list[Line]) -> list[int]:
    return [int(text) for line in lines for text in _INTEGER.findall(line.code)]


def _rise(block: list[Line], turn: list[Line], distance: int) -> set[int] | None:
    """Returns the places of the numbers that rise by one in each turn, None if other text differs."""
    if [(line.depth, _INTEGER.sub("#", line.code)) for line in block] != [
        (line.depth, _INTEGER.sub("#", line.code)) for line in turn
    ]:
        return None
    rising = set()
    for place, (first, now) in enumerate(zip(_numbers(block), _numbers(turn), strict=True)):
        if now == first + distance:
            rising.add(place)
        elif now != first:
            return None
    return rising


def _singular(text: str) -> str:
    name = re.sub(r"\W", "", text.rpartition(".")[2]) or "layer"
    if name.endswith("ies"):
        return name[:-3] + "y"
    if name.endswith("s") and not name.endswith("ss"):
        return name[:-1]
    return (
        "layer"
        if name in ("features", "net", "model") or name.startswith("layer")
        else "block"
        if name.startswith(("stage", "block"))
        else "layer"
    )


def _run(
    lines: list[Line], index: int, size: int
) -> tuple[int, list[str], int, tuple[str, str] | None, list[str]] | None:
    """Returns how often a block of statements repeats, with which lists, the first index, and the block.

    The first turn may read another variable than the others, which is the fourth value with that of the others.
    """
    block = [line.code for line in lines[index : index + size]]
    depths = [line.depth for line in lines[index : index + size]]
    indices = [(match[1], int(match[2])) for code in block for match in _INDEX.finditer(code)]
    if not indices or any(line.startswith(("for ", "if ", "return")) for line in block):
        return None
    starts = {number for _, number in indices}
    if len(starts) != 1:
        return None
    start = starts.pop()
    lists = list(dict.fromkeys(text for text, _ in indices))

    def at(step: int) -> list[str]:
        return [_INDEX.sub(lambda m: f"{m[1]}[{start + step}]", code) for code in block]

    count, entry = 1, None
    while True:
        part = lines[index + size * count : index + size * (count + 1)]
        codes = [line.code for line in part]
        if [line.depth for line in part] != depths:
            break
        if codes != at(count):
            turn = [_INDEX.sub(_earlier, code) for code in codes]
            entry = _entry(block, turn) if count == 1 else entry
            if count > 1 or not entry:
                break
            block = turn
        count += 1
    return (count, lists, start, entry, block) if count > 1 else None


def _earlier(match: re.Match[str]) -> str:
    return f"{match[1]}[{int(match[2]) - 1}]"


def _entry(first: list[str], turn: list[str]) -> tuple[str, str] | None:
    """Returns (a, b) if the first turn of a loop is another one after `b = a`."""
    ours, theirs = (re.findall(r"\w+|\W", "\n".join(codes)) for codes in (first, turn))
    if len(ours) != len(theirs):
        return None
    places = [place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    pairs = {(ours[place], theirs[place]) for place in places}
    if len(pairs) != 1:
        return None
    (a, b), ends, end = pairs.pop(), [], 0
    for code in turn:
        end += len(re.findall(r"\w+|\W", code)) + 1
        ends.append(end)
    number = next((number for number, code in enumerate(turn) if re.match(rf"{b} = ", code)), None)
    if [code.partition(" = ")[0] for code in first] != [code.partition(" = ")[0] for code in turn]:
        return None  # they set other variables
    if number is None or not a.isidentifier() or a == "self" or any(ours[place - 1] == "." for place in places):
        return None
    begin = ends[number - 1] if number else 0
    is_read = b in ours[:begin] or b in ours[begin + 1 : ends[number]]
    return None if is_read or max(places) >= ends[number] else (a, b)
