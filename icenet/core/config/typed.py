"""Gives each value of a YAML file or of `--set` the type of its key."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Discriminator
from pydantic.fields import FieldInfo

from icenet.core.config import scalars, section, yaml_file
from icenet.core.config.scalars import Scalar
from icenet.core.config.section import KeyPath, Section, dotted, shortened


class InvalidValueError(ValueError):
    """A value that cannot be read.

    Attributes:
        path: Path of the key.
        key: The key with dots, for messages.
    """

    def __init__(self, path: KeyPath, problem: str, *, given: str = "") -> None:
        super().__init__(problem)
        self.path = path
        self.key = dotted(*map(str, path)) + given


def resolve(values: Mapping[str, Any], schema: type[Section], path: KeyPath = ()) -> dict[str, Any]:
    """Returns the values of a section in which no `Scalar` is left.

    A value that its key does not allow gets the type that its text shows, for the message of the validation. A
    section that is empty (`training:` with all of its keys commented out) is left out, and so is a list of sections.

    Args:
        values: Keys and values; those that are not from text have a type and are not changed.
        schema: Class of the section.
        path: Path of the section.

    Raises:
        InvalidValueError: A value is not valid YAML (of `--set`), or a number is not decimal.
    """
    resolved = {}
    for key, value in values.items():
        field = schema.model_fields.get(key)
        if field is not None and may_be_empty(field) and _is_empty(value):
            continue
        resolved[key] = _typed(value, _expected(field), (*path, key))
    return resolved


def may_be_empty(field: FieldInfo) -> bool:
    """Returns whether a key is a section, or a list of sections, whose keys all have defaults: it may be null."""
    expected = _expected(field)
    return bool(expected.sections or (expected.items and expected.items.sections)) and not field.is_required()


def _is_empty(value: Any) -> bool:
    """Returns whether a section has no keys. `--set SECTION=` without a value is an error instead."""
    if isinstance(value, Scalar):
        text = value.strip()
        return text in scalars.NULLS and (value.style == "plain" or (value.style == "set" and bool(text)))
    return value is None


class _Expected:
    """What a key allows.

    Attributes:
        kinds: Types of single values: `str`, `int`, `float`, `bool`, `NoneType`.
        items: What the items of a list are, or None if no list is allowed.
        sections: Classes of sections.
        discriminator: Function that returns the name of the class for the values of a section, if there are several.
        anything: Whether the key has no type: an option of a custom model.
    """

    def __init__(self, annotation: Any = Any, discriminator: Any = None) -> None:
        self.kinds: set[type] = set()
        self.items: _Expected | None = None
        self.sections: list[type[Section]] = []
        self.discriminator = discriminator
        self.anything = False
        self._add(annotation)

    def _add(self, annotation: Any) -> None:
        origin = get_origin(annotation)
        if origin is Annotated:
            for metadata in get_args(annotation)[1:]:
                if isinstance(metadata, Discriminator):
                    self.discriminator = metadata.discriminator
            self._add(get_args(annotation)[0])
        elif origin in (Union, types.UnionType):
            for part in get_args(annotation):
                self._add(part)
        elif origin is Literal:
            self.kinds |= {type(choice) for choice in get_args(annotation)}
        elif origin in (list, tuple):
            self.items = _Expected(get_args(annotation)[0])
        elif isinstance(annotation, type) and issubclass(annotation, Section):
            self.sections.append(annotation)
        elif annotation in (str, int, float, bool, types.NoneType):
            self.kinds.add(annotation)
        else:
            self.anything = True

    def section_of(self, values: Mapping[str, Any]) -> type[Section] | None:
        """Returns the class for the values of a section; None if no section is allowed, or its kind is unknown."""
        if self.discriminator is None:
            return self.sections[0] if self.sections else None
        return section.by_name(self.discriminator(values))


_ANYTHING = _Expected()


def _expected(field: FieldInfo | None) -> _Expected:
    if field is None:
        return _ANYTHING
    discriminators = [entry.discriminator for entry in field.metadata if isinstance(entry, Discriminator)]
    return _Expected(field.annotation, next(iter(discriminators), None))


def _typed(value: Any, expected: _Expected, path: KeyPath) -> Any:
    """Returns a value with the types that are expected where they fit."""
    if isinstance(value, Scalar):
        try:
            return _scalar(value, expected, path)
        except InvalidValueError:
            raise
        except ValueError as error:
            may_be_text = expected.anything or str in expected.kinds
            advice = f", or {_quoted(value)} for a text" if may_be_text else ""
            raise InvalidValueError(path, f"{error}{advice}") from None
    if isinstance(value, Mapping):
        schema = expected.section_of(value)
        if schema is not None:
            return resolve(value, schema, path)
        return {key: _typed(item, _ANYTHING, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item, expected.items or _ANYTHING, (*path, i)) for i, item in enumerate(value)]
    return value


def _scalar(value: Scalar, expected: _Expected, path: KeyPath) -> Any:
    """Returns the value of a text."""
    if value.style == "quoted":
        return str(value)
    if value.style == "set":
        value = _from_set(value, expected, path)
        if not isinstance(value, Scalar) or value.style == "quoted":
            return _typed(value, expected, path)
    stripped = value.strip()
    if expected.anything:
        found = scalars.natural(stripped)
        return str(value) if isinstance(found, str) else found
    if stripped in scalars.NULLS and (types.NoneType in expected.kinds or not stripped):
        return None
    if bool in expected.kinds and stripped in scalars.BOOLEANS:
        return scalars.BOOLEANS[stripped]
    if expected.kinds & {int, float}:
        number = scalars.number(stripped)
        if number is not None:
            return number
    if str in expected.kinds:
        return str(value)
    return scalars.natural(stripped, dates=False)


def _from_set(value: Scalar, expected: _Expected, path: KeyPath) -> Any:
    """Reads the text behind `KEY=` of `--set`: a list or a section as YAML, a text as it is.

    Returns:
        A list or mapping with `Scalar` items, or a `Scalar` of style `plain` or `quoted`.
    """
    text = value.strip()
    if not text and (expected.sections or expected.anything or types.NoneType in expected.kinds):
        raise InvalidValueError(path, "has no value; write null, or '' for an empty text")
    plain = Scalar(value, "plain")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        with contextlib.suppress(yaml_file.InvalidYAMLError):
            found = yaml_file.value(text)
            return found if isinstance(found, Scalar) and found.style == "quoted" else plain
    in_brackets = text[:1] in ("[", "{")
    if str in expected.kinds and not (expected.items and text[:1] + text[-1:] == "[]"):
        return plain
    if in_brackets or expected.sections or expected.items or expected.anything:
        try:
            found = yaml_file.value(value)
        except yaml_file.InvalidYAMLError as error:
            if str in expected.kinds or (expected.anything and not in_brackets):
                return plain
            raise InvalidValueError(path, f"the value is {error}", given=f"={shortened(value)}") from None
        if isinstance(found, (list, dict)):
            return found
    return plain


def _quoted(text: str) -> str:
    return "'" + text.strip().replace("'", "''") + "'"
