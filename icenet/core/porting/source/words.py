"""Statements by their words, and what they compute."""

from __future__ import annotations

import functools
import hashlib
import re

from icenet.core.porting.source.lines import Line, split

_TOKEN = re.compile(
    r"\"[^\"]*\"|'[^']*'|\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+|\.[A-Za-z_]\w*|[A-Za-z_]\w*=(?!=)|[A-Za-z_]\w*|\d+|\s+|."
)
_NAME = re.compile(r"[A-Za-z_]\w*")


class Statement:
    """A statement by its words.

    Attributes:
        words: Its text in parts: names of variables and numbers are parts of their own.
        targets: The places of the variables that it sets.
        reads: The places of the variables that it reads.
        numbers: Its integers.
        form: The text without variables and integers, which the statements of all turns have in common.
    """

    def __init__(self, code: str, depth: int) -> None:
        self.words = _TOKEN.findall(code)
        head = code.partition(" = ")[0] if " = " in code else ""
        is_plain = bool(head) and re.fullmatch(r"[\w, ()]+", head) is not None
        self.targets: list[int] = []
        self.reads: list[int] = []
        at = 0
        for place, word in enumerate(self.words):
            if _NAME.fullmatch(word) and word not in ("_", "mx", "nn", "math", "self", "for", "in", "if", "return"):
                (self.targets if is_plain and at < len(head) else self.reads).append(place)
            at += len(word)
        variables = {*self.targets, *self.reads}
        self.numbers = [word for word in self.words if word.isdigit()]
        self.form = (depth, tuple(self.shown(place, variables) for place in range(len(self.words))))

    def shown(self, place: int, variables: set[int]) -> str:
        return "@" if place in variables else "#" if self.words[place].isdigit() else self.words[place]

    def put(self, words: dict[int, str]) -> str:
        """Returns the text with other words at some places."""
        return "".join(words.get(place, word) for place, word in enumerate(self.words))


@functools.lru_cache(maxsize=8192)
def statement_of(code: str, depth: int) -> Statement:
    """Returns a statement, which is looked at from every statement before it."""
    return Statement(code, depth)


_BACKWARDS = re.compile(r"\[([\w, ]*)\]\[::-1\]")


def meaning_of(lines: list[Line]) -> list[str]:
    """Returns what statements without loops compute: the effects and results, with each value as its computation."""
    values: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    effects = []
    for line in lines:
        statement = statement_of(line.code, line.depth)

        def value(name: str) -> str:
            return f"[{', '.join(lists[name])}]" if name in lists else values.get(name, name)

        words = {place: value(statement.words[place]) for place in statement.reads}
        for place in statement.reads:
            name = statement.words[place]
            if lists.get(name) and statement.words[place + 1 : place + 4] == [".pop", "(", ")"]:
                words |= {place: lists[name].pop(), **dict.fromkeys(range(place + 1, place + 4), "")}
        text = statement.put(words)
        text = _BACKWARDS.sub(lambda match: f"[{', '.join(match[1].split(', ')[::-1])}]", text)
        match = re.fullmatch(r"(\w+)\.append\((.*)\)", line.code)
        if match and match[1] in lists:
            lists[match[1]].append(text.partition(".append(")[2][:-1])
            continue
        if not statement.targets:
            effects.append(text)
            continue
        head, _, source = text.partition(" = ")
        names = [statement.words[target] for target in statement.targets]
        if len(names) > 1 and len(parts := split(source)) == len(names):  # a, b = b, f(a, b)
            for name, part in zip(names, parts, strict=True):
                lists.pop(name, None)
                key = f"v{hashlib.sha1(f'@ = {part}'.encode()).hexdigest()}_0"
                values[name] = part if part.isidentifier() else key
            continue
        for name in names:
            lists.pop(name, None)
        if len(names) == 1 and head == names[0] and re.fullmatch(r"\[[^\[\]]*\]", source) and line.code.endswith("]"):
            inner = source[1:-1]
            lists[names[0]] = inner.split(", ") if inner else []
            continue
        if len(names) == 1 and head == names[0] and source.isidentifier():
            values[names[0]] = source
            continue
        key = "v" + hashlib.sha1(f"{re.sub(_NAME, '@', head)} = {source}".encode()).hexdigest()
        for number, name in enumerate(names):
            values[name] = f"{key}_{number}"
    return effects
