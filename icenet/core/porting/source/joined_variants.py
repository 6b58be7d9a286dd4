"""Which variants of an original class become one: those that a layer, an attribute or an argument distinguishes."""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections import Counter
from typing import TypeAlias

from icenet.core.porting.source.constructor_syntax import key_of
from icenet.core.porting.source.instances import NUMBER, Instance
from icenet.core.porting.source.lines import Body
from icenet.core.porting.source.variants import OPEN, Union, union, with_argument, with_flag
from icenet.core.porting.statements import syntax_tree

_MOST = 6
"""How many variants of a class are compared with each other."""
_LEAST = 0.5
"""Which part of its statements a variant shares with another one at least."""
_Found: TypeAlias = "tuple[Union, list[int], list[int]] | None"
"""The class of two variants, and the instances of the smaller and of the larger one."""


class Variants:
    """The variants of one class.

    Args:
        instances: All instances. Those of variants that are joined are changed in place.
        parts: The places of the instances of each variant; those of one differ in numbers only.
    """

    def __init__(self, instances: list[Instance], parts: list[list[int]]) -> None:
        self.instances, self.parts = instances, parts

    def joined(self) -> list[list[int]]:
        """Returns the instances of each class: two variants after another are joined until none fit."""
        while 1 < len(self.parts) <= _MOST:
            pairs = [(self.share(*pair), pair) for pair in itertools.combinations(self.parts, 2)]
            pairs = sorted((item for item in pairs if item[0] >= _LEAST), key=lambda item: -item[0])
            if not any(self.join(*pair) for _, pair in pairs):
                break
        return self.parts

    def share(self, one: list[int], other: list[int]) -> float:
        """Returns which part of the statements of the variant with fewer the other one has, too."""
        counts = []
        for members in (one, other):
            item = self.instances[members[0]]
            lines = [(line.depth, masked(line.code)) for body in item.bodies for line in body.lines]
            counts.append(Counter([*((-1, masked(line)) for line in item.init), *lines]))
        fewest = min(count.total() for count in counts)
        return (counts[0] & counts[1]).total() / fewest if fewest > 1 else 1

    def join(self, one: list[int], other: list[int]) -> bool:
        """Makes two variants one. Returns whether something distinguishes them that the source can say."""
        before = {index: self.instances[index].init for index in (*one, *other)}
        self.set_equally(one, other)
        identities = _identities(*(self.instances[members[0]] for members in (one, other)))
        found = (
            self.with_layers(one, other, identities) or self.with_flag(one, other) or self.with_argument(one, other)
        )
        if found is None:
            for index, init in before.items():
                self.instances[index].init = init
            return False
        made, small, large = found
        for members, is_large in ((small, False), (large, True)):
            for index in members:
                item = self.instances[index]
                init = [line for line in item.init if line not in identities]
                item.init, item.bodies = made.written(init, item.bodies, is_large, masked)
                item.note_text()
        self.parts = [part for part in self.parts if part is not one and part is not other]
        self.parts.append(sorted([*one, *other]))
        return True

    def set_equally(self, one: list[int], other: list[int]) -> None:
        """Sets the attributes on which the methods of one variant decide in the other one, too."""
        inits = [self.instances[members[0]].init for members in (one, other)]
        for init, members in zip(inits, (other, one), strict=True):
            for name in (
                name for line in init for name in re.findall(r"^self\.(\w+) = (?:True|False|[\d.]+)$", line)
            ):
                if all(name in self.instances[index].settings for index in members):
                    for index in members:
                        item = self.instances[index]
                        item.init = _with_attribute(item.init, name, item)

    def example(self, members: list[int], without: set[str] | None = None) -> tuple[list[str], list[Body]]:
        """Returns constructor and methods of an instance of a variant."""
        item = self.instances[members[0]]
        return [line for line in item.init if line not in (without or ())], item.bodies

    def with_layers(self, one: list[int], other: list[int], identities: set[str]) -> _Found:
        found = union(self.example(one, identities), self.example(other, identities), masked)
        if found is None:
            return None
        made, is_first_large = found
        return (made, other, one) if is_first_large else (made, one, other)

    def with_flag(self, one: list[int], other: list[int]) -> _Found:
        """Joins variants with an attribute of the original on which its methods decide."""
        for name in self.flags(one, other):
            is_first_large = bool(self.instances[one[0]].settings[name])
            small, large = (other, one) if is_first_large else (one, other)
            examples = []
            for members in (small, large):
                init, bodies = self.example(members)
                examples.append((_with_attribute(init, name, self.instances[members[0]]), bodies))
            made = with_flag(examples[0], examples[1], masked, name)
            if made is None:
                continue
            for index in (*one, *other):
                self.instances[index].init = _with_attribute(self.instances[index].init, name, self.instances[index])
            return made, small, large
        return None

    def with_argument(self, one: list[int], other: list[int]) -> _Found:
        for small, large in ((one, other), (other, one)):
            made = with_argument(self.example(small), self.example(large), masked)
            if made is not None:
                return made, small, large
        return None

    def flags(self, one: list[int], other: list[int]) -> list[str]:
        """Returns the attributes that are true in one variant and false in the other, and that a test reads."""
        items = [self.instances[index] for index in (*one, *other)]
        names = [
            name
            for name in items[0].settings
            if all(type(item.settings.get(name)) in (bool, float) for item in items) and name.isidentifier()
        ]
        tested = {name for item in items for file in _files(item) for name in _tested(file)}
        return [
            name
            for name in names
            if name in tested
            and len({bool(self.instances[index].settings[name]) for index in one}) == 1
            and len({bool(self.instances[index].settings[name]) for index in other}) == 1
            and bool(self.instances[one[0]].settings[name]) != bool(self.instances[other[0]].settings[name])
        ]


def _with_attribute(init: list[str], name: str, item: Instance) -> list[str]:
    """Returns a constructor that sets an attribute to the number of the original."""
    if any(line.lstrip().startswith(f"self.{name} = ") for line in init):
        return init
    return [f"self.{name} = {item.settings[name]!r}", *init]


def _files(item: Instance) -> set[str]:
    """Returns the files of the constructor and of the methods that an instance has in the original."""
    origins = [line.origin for body in item.bodies for line in body.lines if line.origin]
    made = {item.constructor.file} if item.constructor is not None else set()
    return made | {file for origin in origins for file, _ in origin}


@functools.lru_cache(maxsize=64)
def _tested(file: str) -> frozenset[str]:
    """Returns the attributes of `self` and the arguments of functions that the conditions of a file read."""
    tests = [item.test for item in ast.walk(syntax_tree(file)) if isinstance(item, (ast.If, ast.IfExp))]
    read = {key_of(part).removeprefix("self.") for test in tests for part in ast.walk(test)}
    return frozenset(name for name in read if name.isidentifier())


def masked(text: str) -> str:
    """Returns a text with a mark in the place of each number."""
    return NUMBER.sub(OPEN, text)


def _identities(first: Instance, second: Instance) -> set[str]:
    """Returns the statements that set an identity in one of two instances where the other has a layer.

    Its class can lack the layer: an identity is not called.
    """
    found = set()
    for one, other in ((first, second), (second, first)):
        targets = {line.partition(" = ")[0] for line in other.init if not line.endswith(" = nn.Identity()")}
        code = "\n".join(body.key() for body in one.bodies)
        for line in one.init:
            target, _, value = line.partition(" = ")
            if value == "nn.Identity()" and target in targets and f"{target}(" not in code:
                found.add(line)
    return found
