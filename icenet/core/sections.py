"""A part of the configuration: what all of them share. The parts are in `families` and `config`."""

from __future__ import annotations

import difflib
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

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
            raise _explained(error, self) from None

    # pydantic calls a custom __init__ for nested sections too, which would hide where an error stands
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        before = dict(self.__dict__)
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            self.__dict__.update(before)  # a check across fields runs after the value is in place
            raise _explained(error, self) from None


def _explained(error: ValidationError, section: Section) -> ConfigError:
    from icenet.core.config_errors import explain  # late: it knows all sections, and they know this one

    return ConfigError(explain(error, type(section), prefix=section.section))


def dotted(*parts: str) -> str:
    """The parts that are there, joined by dots."""
    return ".".join(part for part in parts if part)


def nearest(name: str, known: list[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(known)}" if known else ""
