"""A part of the configuration: what all of them share, and how their errors are told.

The parts themselves are in `families` and `config`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from icenet.core.config import yaml_file
from icenet.core.errors import ConfigError


class Section(BaseModel):
    """A part of the configuration: strict keys, strict types, checked assignments."""

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
    section: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self), prefix=self.section)) from None

    # pydantic calls a custom __init__ for nested sections too, which would hide where an error stands
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        before = dict(self.__dict__)
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            self.__dict__.update(before)  # a check across fields runs after the value is in place
            raise ConfigError(explain(error, type(self), prefix=self.section)) from None

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        _SECTIONS[cls.__name__] = cls


_SECTIONS: dict[Any, type[Section]] = {}
"""All sections by the name of their class, which is also their tag where one of several is chosen."""


def explain(
    error: ValidationError,
    schema: type[Section],
    *,
    prefix: str = "",
    lines: yaml_file.Lines | None = None,
    file: Path | None = None,
) -> str:
    """One line for a validation error: where it stands, which key, what is wrong, what is allowed.

    `lines` maps key paths to line numbers of `file`. Of several errors the first is told, and how many follow.
    """
    details = error.errors(include_url=False)
    # a misspelt section is also a missing one: the misspelling says more
    details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
    first = details[0]
    path = tuple(part for part in first["loc"] if part not in _SECTIONS and not str(part).startswith("function-"))
    if first["type"] in ("family", "kind"):
        path = (*path, "type" if first["type"] == "family" else "kind")
    if first["type"] in ("int_type", "string_type") and path[-1:] in (("int",), ("str",)):  # one side of a union
        path = path[:-1]
        details = [detail for detail in details if detail["loc"][:-1] != first["loc"][:-1]] + [first]
        first["msg"] = "must be an integer or a text"
    where = ""
    line = next((lines[path[:n]] for n in range(len(path), -1, -1) if lines and path[:n] in lines), None)
    changed = any(number == 0 and at[: len(path)] == path for at, number in (lines or {}).items())
    if line == 0 or (changed and first["type"] == "value_error"):  # see Config._checked
        where = "--set "
    elif file is not None:
        where = f"{file}:{line}: " if line else f"{file}: "
    name = dotted(prefix, *map(str, path))
    value = first.get("input")
    kind = first["type"]
    if kind in ("extra_forbidden", "no_such_attribute"):
        section = _section_at(schema, first["loc"][:-1])
        problem = f"unknown key{nearest(str(path[-1]), list(section.model_fields) if section else [])}"
    elif kind == "kind":
        given = value.get("kind") if isinstance(value, Mapping) else value
        problem = f"no kind {given!r}{nearest(str(given), first['ctx']['known'].split(', '))}"
    elif kind == "model_type":
        problem = f"must be a mapping of keys, not {value!r}"
    elif kind == "missing":
        problem = "required, and not given"
    elif kind == "family":
        problem = no_family(value, first["ctx"]["known"].split(", "))
    elif kind == "string_pattern_mismatch" and path[-1:] == ("device",):
        problem = f"must be auto, cpu, gpu, mps, cuda or cuda:N, not {value!r}"
    elif kind == "value_error":
        problem = str(first["ctx"]["error"])
    else:
        message = first["msg"].replace("Input should be", "must be").replace("a valid ", "a ")
        message = message.replace("a integer", "an integer").replace("List should", "must")
        allowed = str(first.get("ctx", {}).get("expected", ""))
        choices = [choice.strip(" '") for choice in allowed.replace(" or ", ", ").split(",")]
        close = difflib.get_close_matches(value, choices, 1) if isinstance(value, str) and allowed else []
        problem = f"{message}, not {value!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{where}{name + ': ' if name else ''}{problem}{more}"


def _section_at(schema: type[Section], loc: tuple[Any, ...]) -> type[Section] | None:
    """The section class that an error's location ends in."""
    section: type[Section] | None = schema
    for part in loc:
        if part in _SECTIONS:  # the tag of one of several
            section = _SECTIONS[part]
        elif section is not None:
            field = section.model_fields.get(part) if isinstance(part, str) else None
            inner = field.annotation if field else section if isinstance(part, int) else None
            inner = next(iter(get_args(inner)), inner)  # the sections of a list
            section = inner if isinstance(inner, type) and issubclass(inner, Section) else None
    return section


def no_family(values: Any, known: Sequence[str]) -> str:
    """What is wrong with the `type` of a tree of values."""
    family = values.get("type") if isinstance(values, Mapping) else None
    if family is None:
        return f"required; one of {', '.join(known)}, or my_models.py:MyModel"
    return f"no family {family!r}{nearest(str(family), list(known))}"


def dotted(*parts: str) -> str:
    """The parts that are there, joined by dots."""
    return ".".join(part for part in parts if part)


def nearest(name: str, known: list[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, or all of them."""
    initials = [key for key in known if "".join(word[:1] for word in key.split("_")) == name]  # lr, wd
    close = initials or difflib.get_close_matches(name, known, 1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(known)}" if known else ""
