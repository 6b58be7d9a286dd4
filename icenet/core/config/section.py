"""The base class of all sections of the configuration, and their error messages."""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from icenet.core.config import scalars, yaml_file
from icenet.core.errors import ConfigError


def to_python(value: Any) -> Any:
    """Returns a value that a program took from numpy (`for rate in numpy.geomspace(...)`) as a value of Python."""
    if isinstance(value, list):
        return [to_python(item) for item in value]
    return value.tolist() if type(value).__module__ == "numpy" and hasattr(value, "tolist") else value


Size = Annotated[int, Field(ge=1, le=2**24)]
"""A width, a depth or a count. The bound catches typing errors before memory is allocated."""

PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A section of the configuration: strict keys, strict types, checked assignments."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True, allow_inf_nan=False)
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

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        # pydantic's use_attribute_docstrings reads the source of each class whenever IceNet is imported: 0.08 s
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for key, text in _docstrings(cls).items():
            properties[key]["description"] = text
        return schema

    def __setattr__(self, name: str, value: Any) -> None:
        before = dict(self.__dict__)
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            self.__dict__.update(before)  # checks of several fields run after the assignment
            raise ConfigError(explain(error, type(self), prefix=self.section)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _to_python(cls, value: Any) -> Any:
        return to_python(value)

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


def _docstrings(section: type[Section]) -> dict[str, str]:
    """Returns the text under each key in the source of a section and of its base classes."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if not issubclass(base, Section):
            continue
        definition = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for field, text in itertools.pairwise(definition.body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as content)):
                    found[name] = inspect.cleandoc(content)
    return {name: text for name, text in found.items() if name in section.model_fields}


def by_name(name: Any) -> type[Section] | None:
    """Returns the section of a class name, or None."""
    return _SECTIONS.get(name)


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
    path = tuple(key for key in first["loc"] if key not in _SECTIONS and not str(key).startswith(("function-", "[")))
    number = len(details)
    if first["type"] in ("family", "kind"):
        path = (*path, "type" if first["type"] == "family" else "kind")
    elif first["type"] in ("int_type", "string_type") and path[-1:] in (("int",), ("str",)):
        # a value of type `int | str` has one problem for each of the two types
        path = path[:-1]
        number -= sum(detail["loc"][:-1] == first["loc"][:-1] for detail in details) - 1
        first["msg"] = "must be an integer or a string"
    where = location(path, lines or {}, file, of_several=first["type"] == "value_error")
    key = dotted(prefix, *map(str, path))
    more = f" (and {number - 1} more)" if number > 1 else ""
    return f"{where}{key + ': ' if key else ''}{_problem(first, path, schema)}{more}"


def location(path: KeyPath, lines: yaml_file.Lines, file: Path | None, *, of_several: bool = False) -> str:
    """Returns where a key is: `--set `, `FILE:LINE: `, `FILE: ` or nothing.

    Args:
        path: Path of the key.
        lines: Line number of each key in `file`; 0 for a key of `--set`.
        file: The YAML file.
        of_several: Whether the keys below it are meant as well.
    """
    line = next((lines[path[:depth]] for depth in range(len(path), -1, -1) if path[:depth] in lines), None)
    overridden_below = any(number == 0 and key[: len(path)] == path for key, number in lines.items())
    if line == 0 or (overridden_below and of_several):
        return "--set "
    if file is None:
        return ""
    return f"{file}:{line}: " if line else f"{file}: "


def _problem(detail: Any, path: KeyPath, schema: type[Section]) -> str:
    """Describes one problem of a validation error and what is allowed instead."""
    kind, value, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    if kind in ("extra_forbidden", "no_such_attribute"):
        return f"unknown key{_remedy_for_key(str(path[-1]), _section_at(schema, detail['loc'][:-1]))}"
    if kind == "family":
        return unknown_family(value, context["known"].split(", "))
    if kind == "kind":
        given = value.get("kind") if isinstance(value, Mapping) else value
        if isinstance(given, str) and given.endswith(".py"):
            return f"{shown(given)} names no class; write {given}:CLASS"
        return f"unknown kind {shown(given)}{nearest(str(given), context['known'].split(', '))}"
    if kind == "missing":
        return "required, but missing"
    if kind == "model_type":
        return f"must be a mapping of keys, not {shown(value)}"
    if kind == "string_pattern_mismatch" and path[-1:] == ("device",):
        return f"must be auto, cpu, gpu, mps, cuda or cuda:N, not {shown(value)}"
    if kind == "string_pattern_mismatch" and path[-1:] == ("loss",):
        return f"must be cross_entropy or FILE.py:FUNCTION, not {shown(value)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_unicode":
        return f"{shown(value)} is not UTF-8 text; rename the file"
    message = detail["msg"].replace("Input should be", "must be").replace("List should", "must")
    message = message.replace("a valid ", "a ").replace("a integer", "an integer")
    expected = str(context.get("expected", ""))
    choices = [choice.strip(" '") for choice in expected.replace(" or ", ", ").split(",")]
    close = difflib.get_close_matches(value.lower(), choices, 1) if isinstance(value, str) and expected else []
    remedy = f"; did you mean {close[0]!r}?" if close else _remedy_for_value(kind, value)
    if not remedy and value in ("None", "none") and _may_be_null(_section_at(schema, detail["loc"][:-1]), path):
        remedy = "; write null"
    if isinstance(value, str) and expected:
        remedy += _strange_characters(value)
    return f"{message}, not {shown(value)}{remedy}"


def _may_be_null(section: type[Section] | None, path: KeyPath) -> bool:
    field = section.model_fields.get(path[-1]) if section and path else None
    return field is not None and type(None) in get_args(field.annotation)


def _remedy_for_value(kind: str, value: Any) -> str:
    """Returns how to write a value of the expected type; empty if there is nothing to add."""
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        return scalars.ways_to_write(value)
    if kind == "bool_type":
        return "; write true or false"
    if kind == "list_type" and isinstance(value, (str, int, float)):
        numbers = all(scalars.NUMBER.fullmatch(part.strip()) for part in str(value).split(","))
        return f"; write [{value if numbers else shown(value)}]"
    if kind == "list_type" and isinstance(value, Mapping) and value and all(map(str.isdigit, value)):
        return "; an item cannot be set alone: give the whole list in brackets"
    if kind == "string_type" and value is None:
        return "; write '' for an empty text, quotes around one that begins with #, or no key for the default"
    if kind == "string_type" and isinstance(value, (list, Mapping)):
        return "; put a text with brackets or colons in quotes"
    return ""


def _remedy_for_key(name: str, section: type[Section] | None) -> str:
    """Returns the advice for an unknown key of a section."""
    known = list(section.model_fields) if section else []
    own = section.section if section else ""
    *sections, last = re.split(r"[./:]", name)
    if sections and _keys_of(dotted(own, *sections)):
        return f"; write it as {last}: under {'.'.join(sections)}:"
    if _normal(name.partition(":")[0]) in map(_normal, known) and ":" in name:
        return f"; write a space after the colon{_strange_characters(name)}"
    if _normal(name) not in map(_normal, known):
        kinds = [_kind_of(other) for other in _SECTIONS.values() if other.section == own and _has_key(other, name)]
        if any(kinds):
            return f"; it is for {' or '.join(kind for kind in kinds if kind)}"
        places = ["", "model", "data", "training", "generation", "embedding"]
        found = [place for place in places if place != own and _normal(name) in map(_normal, _keys_of(place))]
        if found:
            where = (f"under {place}:" if place else "at the top level" for place in found)
            return f"; it belongs {' or '.join(where)}{_strange_characters(name)}"
    suggestion = nearest(name, known)
    if len(known) > MAX_LISTED and suggestion.startswith("; known:"):
        suggestion = f"; icenet schema lists the {len(known)} keys"
    return suggestion + _strange_characters(name)


MAX_LISTED = 16
"""Number of keys that a message lists at most."""


def _has_key(section: type[Section], name: str) -> bool:
    return _normal(name) in map(_normal, section.model_fields)


def _kind_of(section: type[Section]) -> str:
    """Returns the key and the values that select a section among several: `data.kind images`; else nothing."""
    key = next((key for key in ("type", "kind") if key in section.model_fields), "")
    annotation = section.model_fields[key].annotation if key else None
    values = get_args(annotation) if get_origin(annotation) is Literal else ()
    return f"{section.section}.{key} {', '.join(values)}" if values else ""


def _keys_of(place: str) -> set[str]:
    """Returns the keys of all sections at a place, which is `` for the top level."""
    return {key for section in _SECTIONS.values() if section.section == place for key in section.model_fields}


def _normal(key: str) -> str:
    """Returns a key without the differences of spelling that people make: case, hyphens, spaces, wide letters."""
    return re.sub(r"[-_\s]", "", unicodedata.normalize("NFKC", key)).casefold()


def _strange_characters(text: str) -> str:
    names = scalars.strange_characters(text)
    return f" (it contains {names})" if names else ""


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
    if values is not None and not isinstance(values, Mapping):
        return f"the section must be a mapping of keys, such as {{type: transformer}}, not {shown(values)}"
    family = (values or {}).get("type")
    if family is None:
        return f"required; one of {', '.join(known)}, or my_models.py:MyModel"
    if isinstance(family, str) and family.endswith(".py"):
        return f"{shown(family)} names no class; write {family}:CLASS"
    return f"unknown family {shown(family)}{nearest(str(family), list(known))}"


def shown(value: Any) -> str:
    """Returns a value as Python writes it, without the middle part if it is long."""
    return shortened(repr(value))


def shortened(text: str) -> str:
    """Returns a text without its middle part if it is long, for error messages of one line."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 120 else f"{text[:80]} ... {text[-20:]}"


def dotted(*parts: str) -> str:
    """Joins the non-empty parts with dots."""
    return ".".join(part for part in parts if part)


def nearest(name: str, known: list[str]) -> str:
    """Returns a suggestion for an unknown name: the most similar known one, or else all of them."""
    same = [key for key in known if _normal(key) == _normal(name)]
    same_initials = [key for key in known if "".join(word[:1] for word in key.split("_")) == name]  # lr, wd
    close = same or same_initials or difflib.get_close_matches(name, known, 1)
    if close and close[0] == name.strip():
        return f"; write {close[0]} without spaces around it"
    if close:
        return f"; did you mean {visible(close[0])}?"
    return f"; known: {', '.join(map(visible, known))}" if known else ""


def visible(name: str) -> str:
    """Returns a name, in quotation marks if it is empty or has spaces at its ends."""
    return name if name and name == name.strip() else repr(name)
