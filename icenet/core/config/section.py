"""The base class of all sections of the configuration, and their error messages."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from icenet.core.config import yaml_file
from icenet.core.errors import ConfigError


class Section(BaseModel):
    """A section of the configuration: strict keys, strict types, checked assignments."""

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
    section: ClassVar[str] = ""
    """Key of the section, for error messages."""
    any_magnitude: ClassVar[frozenset[str]] = frozenset()
    """Keys whose numbers may be 0 or infinite in float32."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self), prefix=self.section)) from None

    # pydantic calls a custom __init__ for nested sections too, which would hide the location of an error
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        before = dict(self.__dict__)
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            self.__dict__.update(before)  # checks of several fields run after the assignment
            raise ConfigError(explain(error, type(self), prefix=self.section)) from None

    @field_validator("*")
    @classmethod
    def _check_range_of_float32(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses a number that is 0 or infinite in float32, in which the frameworks compute with it."""
        if info.field_name in cls.any_magnitude:
            return value
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and number and not _LEAST <= abs(number) <= _MOST:
                limit = f"less than {_LEAST:.2g}" if abs(number) < 1 else f"more than {_MOST:.2g}"
                raise ValueError(f"{number:g} is {limit} in magnitude, the limit of float32")
        return value

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        _SECTIONS[cls.__name__] = cls


_LEAST, _MOST = 1.1754944e-38, 3.4028235e38
"""The smallest normal number (devices round smaller ones to 0) and the largest number of float32."""

_SECTIONS: dict[Any, type[Section]] = {}
"""All sections by class name, which is also the tag of a section in a union of several."""

KeyPath = tuple[Any, ...]
"""Keys from the root of the configuration to a value."""


def explain(
    error: ValidationError,
    schema: type[Section],
    *,
    prefix: str = "",
    lines: yaml_file.Lines | None = None,
    file: Path | None = None,
) -> str:
    """Returns a validation error as one line: location, key, problem, allowed values.

    Args:
        error: The error of pydantic. Of several problems the first is described and the others are counted.
        schema: Class that was validated.
        prefix: Key of the section, if it was validated alone.
        lines: Line number of each key in `file`; 0 for a key of `--set`.
        file: The YAML file.
    """
    details = error.errors(include_url=False)
    # a misspelt section is also a missing one: report the misspelling
    first = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    path = tuple(key for key in first["loc"] if key not in _SECTIONS and not str(key).startswith("function-"))
    number = len(details)
    if first["type"] in ("family", "kind"):
        path = (*path, "type" if first["type"] == "family" else "kind")
    elif first["type"] in ("int_type", "string_type") and path[-1:] in (("int",), ("str",)):
        # a value of type `int | str` has one problem for each of the two types
        path = path[:-1]
        number -= sum(detail["loc"][:-1] == first["loc"][:-1] for detail in details) - 1
        first["msg"] = "must be an integer or a string"
    where = _location(path, first["type"], lines or {}, file)
    key = dotted(prefix, *map(str, path))
    more = f" (and {number - 1} more)" if number > 1 else ""
    return f"{where}{key + ': ' if key else ''}{_problem(first, path, schema)}{more}"


def _location(path: KeyPath, kind: str, lines: yaml_file.Lines, file: Path | None) -> str:
    """Returns `--set `, `FILE:LINE: `, `FILE: ` or nothing."""
    line = next((lines[path[:depth]] for depth in range(len(path), -1, -1) if path[:depth] in lines), None)
    overridden_below = any(number == 0 and key[: len(path)] == path for key, number in lines.items())
    if line == 0 or (overridden_below and kind == "value_error"):
        return "--set "
    if file is None:
        return ""
    return f"{file}:{line}: " if line else f"{file}: "


def _problem(detail: Any, path: KeyPath, schema: type[Section]) -> str:
    """Describes one problem of a validation error and what is allowed instead."""
    kind, value, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    if kind in ("extra_forbidden", "no_such_attribute"):
        section = _section_at(schema, detail["loc"][:-1])
        return f"unknown key{nearest(str(path[-1]), list(section.model_fields) if section else [])}"
    if kind == "family":
        return unknown_family(value, context["known"].split(", "))
    if kind == "kind":
        given = value.get("kind") if isinstance(value, Mapping) else value
        return f"unknown kind {given!r}{nearest(str(given), context['known'].split(', '))}"
    if kind == "missing":
        return "required, but missing"
    if kind == "model_type":
        return f"must be a mapping of keys, not {value!r}"
    if kind == "string_pattern_mismatch" and path[-1:] == ("device",):
        return f"must be auto, cpu, gpu, mps, cuda or cuda:N, not {value!r}"
    if kind == "value_error":
        return str(context["error"])
    message = detail["msg"].replace("Input should be", "must be").replace("List should", "must")
    message = message.replace("a valid ", "a ").replace("a integer", "an integer")
    expected = str(context.get("expected", ""))
    choices = [choice.strip(" '") for choice in expected.replace(" or ", ", ").split(",")]
    close = difflib.get_close_matches(value, choices, 1) if isinstance(value, str) and expected else []
    return f"{message}, not {value!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def _section_at(schema: type[Section], location: KeyPath) -> type[Section] | None:
    """Returns the class of the section at the location of an error, or None."""
    section: type[Section] | None = schema
    for part in location:
        if part in _SECTIONS:  # the tag in a union
            section = _SECTIONS[part]
        elif section is not None:
            field = section.model_fields.get(part) if isinstance(part, str) else None
            inner = field.annotation if field else section if isinstance(part, int) else None
            inner = next(iter(get_args(inner)), inner)  # the items of a list
            section = inner if isinstance(inner, type) and issubclass(inner, Section) else None
    return section


def unknown_family(values: Any, known: Sequence[str]) -> str:
    """Describes a missing or unknown `type` in a section `model`."""
    family = values.get("type") if isinstance(values, Mapping) else None
    if family is None:
        return f"required; one of {', '.join(known)}, or my_models.py:MyModel"
    return f"unknown family {family!r}{nearest(str(family), list(known))}"


def dotted(*parts: str) -> str:
    """Joins the non-empty parts with dots."""
    return ".".join(part for part in parts if part)


def nearest(name: str, known: list[str]) -> str:
    """Returns a suggestion for an unknown name: the most similar known one, or else all of them."""
    same_initials = [key for key in known if "".join(word[:1] for word in key.split("_")) == name]  # lr, wd
    close = same_initials or difflib.get_close_matches(name, known, 1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(known)}" if known else ""
