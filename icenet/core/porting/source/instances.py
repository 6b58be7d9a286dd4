"""Instances of classes of a source, and the classes that are made of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from icenet.core.porting.record import Constructor
from icenet.core.porting.source.lines import Body

NUMBER = re.compile(r"(?<![\w.\]])(?:(?:-(?=\d))?\d+(?:\.\d+)?(?:e-?\d+)?|True|False)(?![\w])|§")
"""A number or a boolean in the text of an instance, or the mark of one that it lacks (`variants.OPEN`)."""


@dataclass
class Class:
    """A generated class.

    Attributes:
        name: Its name.
        init: The statements of its constructor.
        bodies: The bodies of its methods, `__call__` first.
        parameters: The parameters of its constructor.
        keys: What parameters are in the original, such as "config.hidden_size", by name.
    """

    name: str
    init: list[str]
    bodies: list[Body] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)


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
