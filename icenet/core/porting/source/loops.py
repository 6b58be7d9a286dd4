"""Repeated statements as loops over the lists of a module."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from icenet.core.porting.graph.calls import Item
from icenet.core.porting.record import WHOLE, Node
from icenet.core.porting.source.lines import RESERVED, Line
from icenet.core.porting.source.originals import loop_names, tuple_names
from icenet.core.porting.source.turns import Loop, turns

ELEMENT = re.compile(r"self[\w.\[\]'\"]*\[\d+\](\.\w+)?\(")
RANGE = re.compile(r"(self[^@\s]*)@(\d+):(\d+)@")
_INDEX = re.compile(r"(self(?:\.\w+|\[\"?'?\w+'?\"?\])*?)\[(\d+)\]")


def kind(item: Item) -> str:
    """Returns what an operation has in common with that of another turn of a loop."""
    if isinstance(item, Node) and item.op not in WHOLE:
        return item.op
    return re.sub(r"\.\d+(?=\.|$)", ".#", item.args["path"] if isinstance(item, Node) else item.path)


def roll(lines: list[Line], names: dict[str, str]) -> list[Line]:
    """Writes repeated statements that differ in the index of a list, or in a number that rises, as a loop.

    Args:
        lines: The statements of a body.
        names: The variables that hold the lists of the original, by their texts.
    """
    index = 0
    while index < len(lines):
        best = None
        for size in range(1, min(24, (len(lines) - index) // 2) + 1):
            found = _run(lines, index, size)
            if found is not None and (best is None or found[0] * size > best[0] * best[1]):
                best = (*found[:1], size, *found[1:])
        if best is None:
            loop = turns(lines, index, names)
            if loop is None:
                index += 1
                continue
            head, inner = _enumerated(loop)
            inner = _with_loops(inner, loop.after, names)
            lines = [*loop.before, head, *inner, *loop.after]
            index = len(lines) - len(loop.after)
            continue
        count, size, lists, start, entry, turn = best
        block = [
            line
            if len({lines[index + size * step + row].comment for step in range(count)}) == 1
            else replace(line, comment="")
            for row, line in enumerate(lines[index : index + size])
        ]  # without a shape that is that of one turn only
        if entry:
            block = [replace(line, code=code) for line, code in zip(block, turn, strict=True)]
        others = [*lines[:index], *lines[index + size * count :]]
        elements = _named(block, lists, others) or [_singular(text) for text in lists]
        elements = [name if elements.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(elements)]
        inner = []
        for line in block:
            code = line.code
            for text, name in zip(lists, elements, strict=True):
                code = code.replace(f"{text}[{start}]", name)
            inner.append(Line(code, line.comment, line.depth + 1))
        ranges = [f"{text}@{start}:{start + count}@" for text in lists]
        given = ranges[0] if len(ranges) == 1 else f"zip({', '.join(ranges)})"
        head = Line(f"for {', '.join(elements)} in {given}:", "", block[0].depth)
        if len(elements) == 1:
            head, inner = _in_parts(head, inner, elements[0], others, block[0].origin)
        before = [Line(f"{entry[1]} = {entry[0]}", "", block[0].depth)] if entry else []
        after = lines[index + size * count :]
        inner = _with_loops(inner, after, names)
        lines = [*lines[:index], *before, head, *inner, *after]
        index += len(before) + len(inner) + 1
    return lines


_WORD = re.compile(r"(?<![\w.])[A-Za-z_]\w*\b(?!=[^=])")


def _with_loops(body: list[Line], after: list[Line], names: dict[str, str]) -> list[Line]:
    """Writes the statements of a loop with the loops within it: `for i in range(H):` has `for j in range(W):`.

    Args:
        body: The statements.
        after: Those after the loop.
        names: See `roll`.
    """
    later = {word for line in after for word in _WORD.findall(line.code)}
    assigned: dict[str, None] = {}
    kept = dict.fromkeys(sorted(later))  # with what the next turn reads
    for line in body:
        head, equals, value = line.code.partition(" = ")
        kept |= {word: None for word in _WORD.findall(value if equals else head) if word not in assigned}
        assigned |= dict.fromkeys(_WORD.findall(head) if equals else ())
    end = Line(f"return {', '.join(kept)}", "", body[0].depth)
    rolled = roll([*body, end], names)
    return rolled[:-1] if rolled[-1].code == end.code else body


_HEAD = re.compile(r"for ([\w, ]+) in ")
_STEP = re.compile(r"(self(?:\.\w+|\[\"?'?\w+'?\"?\])*?)\[step\]")


def _enumerated(loop: Loop) -> tuple[Line, list[Line]]:
    """Writes a loop over the steps as one over the list of which it takes the element of each step."""
    head, inner = loop.head, loop.body
    lists = {match[1] for line in inner for match in _STEP.finditer(line.code)}
    if len(lists) != 1 or loop.step != 1:
        return head, inner
    text = lists.pop()
    name = next(iter(_named(inner, [text], [*loop.before, *loop.after])), "") or _singular(text)
    used = {word for line in inner for word in re.findall(r"\w+", line.code)}
    if name in used:
        return head, inner
    inner = [replace(line, code=line.code.replace(f"{text}[step]", name)) for line in inner]
    part = f"{text}@{loop.start}:{loop.start + loop.count}@"
    if any(re.search(r"\bstep\b", line.code) for line in inner):
        first = f", {loop.start}" if loop.start else ""
        return replace(head, code=f"for step, {name} in enumerate({part}{first}):"), inner
    return _in_parts(
        replace(head, code=f"for {name} in {part}:"), inner, name, [*loop.before, *loop.after], inner[0].origin
    )


def _in_parts(head: Line, inner: list[Line], name: str, others: list[Line], origin: Any) -> tuple[Line, list[Line]]:
    """Gives the parts of the element of a loop the variables of the original: `for a, b in self.pairs:`."""
    parts = tuple_names(*origin[-1]) if origin else ()
    text = "\n".join(line.code for line in inner)
    words = {word for line in (*inner, *others) for word in re.findall(r"\w+", line.code)} - {name}
    element = re.compile(rf"\b{name}\[(\d+)\]")
    numbers = {int(number) for number in element.findall(text)}
    is_whole = len(element.findall(text)) == len(re.findall(rf"\b{name}\b", text))
    if not numbers or not is_whole or max(numbers) >= len(parts) or not words.isdisjoint(parts):
        return head, inner
    inner = [replace(line, code=element.sub(lambda match: parts[int(match[1])], line.code)) for line in inner]
    given = head.code.partition(" in ")[2]
    return replace(head, code=f"for {', '.join(parts)} in {given}"), inner


def _named(block: list[Line], lists: list[str], others: list[Line]) -> list[str]:
    """Returns the variables that the original's loop has for the elements of lists, none if they are not free."""
    origin = block[0].origin
    known = loop_names(*origin[-1]) if origin else {}
    known = {text: name for text, name in known.items() if not text.startswith("range(")}  # of numbers
    names = [*known.values()] if len(known) == len(lists) == 1 else [known[text] for text in lists if text in known]
    elements = {name for line in others if (head := _HEAD.match(line.code)) for name in head[1].split(", ")}
    words = {word for line in (*block, *others) for word in re.findall(r"\w+", line.code)} - elements
    words |= {word for line in block for word in re.findall(r"\w+", line.code)}
    is_free = len(names) == len(lists) == len({*names}) and words.isdisjoint(names)
    return names if is_free and not any(name in RESERVED or name == "step" for name in names) else []


def _singular(text: str) -> str:
    """Returns a name for the elements of a list: `block` for `self.blocks` and for `self["blocks"]`."""
    name = re.sub(r"\W", "", re.split(r"[.\"']", text.rstrip("\"']"))[-1]) or "layer"
    if name.endswith("ies"):
        return name[:-3] + "y"
    if name.endswith("s") and not name.endswith("ss") and name != "s":
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
