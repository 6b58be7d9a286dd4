"""Instances of classes of a source, and the classes that are made of them."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import Any

from icenet.core.porting.record import Constructor
from icenet.core.porting.source.lines import Body

CAUSAL = '"causal"'
NUMBER = re.compile(
    rf"(?<![\w.\]])(?:(?:-(?=\d))?\d+(?:\.\d+)?(?:e-?\d+)?|True|False)(?![\w])|§|(?<=\bmask=)(?:None\b|{CAUSAL})"
)
"""A number, a boolean or a mask in the text of an instance, or the mark of one that it lacks (`variants.OPEN`)."""
_ATTENTION = re.compile(r"\bmx\.fast\.scaled_dot_product_attention\(")


@dataclass
class Class:
    """A generated class.

    Attributes:
        name: Its name.
        init: The statements of its constructor.
        bodies: The bodies of its methods, `__call__` first.
        parameters: The parameters of its constructor.
        keys: What parameters are in the original, such as "config.hidden_size", by name.
        flags: The parameters that are False or None by default.
    """

    name: str
    init: list[str]
    bodies: list[Body] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)


@dataclass
class Instance:
    """An instance of a class that is to be generated.

    Attributes:
        name: The name of the class in the original.
        init: The statements of its constructor, with a mark in the place of each inner instance.
        bodies: The bodies of its methods.
        height: 1 without inner instances, and one more than that of the highest inner one.
        settings: Its attributes in the original that are numbers, by name.
        constructor: Where the original makes it, None if that is not known.
        text: All of this as one text, by which equal instances are found.
    """

    name: str
    init: list[str]
    bodies: list[Body]
    height: int
    settings: dict[str, Any] = field(default_factory=dict)
    constructor: Constructor | None = None
    text: str = ""

    def note_text(self) -> None:
        """Sets `text`."""
        self.text = "\n".join([*self.init, "-" * 8, *(body.key() for body in self.bodies)])

    def open_masks(self) -> None:
        """Says of each fused attention without a mask that it has none, so that others may be causal."""
        for line in (line for body in self.bodies for line in body.lines):
            for start in [match.end() for match in _ATTENTION.finditer(line.code)][::-1]:
                depths = itertools.accumulate({"(": 1, ")": -1}.get(letter, 0) for letter in line.code[start:])
                end = start + next(index for index, depth in enumerate(depths) if depth < 0)
                if "mask=" not in line.code[start:end]:
                    line.code = f"{line.code[:end]}, mask=None{line.code[end:]}"
