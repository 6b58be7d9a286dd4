"""What is wrong with a configuration, told so that a person can act on it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from icenet.core import yaml_file
from icenet.core.config import DATA, Config
from icenet.core.families import SECTIONS, no_family
from icenet.core.sections import Section, dotted, nearest

_TAGS: dict[Any, type[Section]] = {section.__name__: section for section in (*SECTIONS, *DATA)}


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
    path = tuple(part for part in first["loc"] if part not in _TAGS and not str(part).startswith("function-"))
    if first["type"].startswith("union_tag") and path == ("model",):
        path = ("model", "type")
    if first["type"] in ("int_type", "string_type") and path[-1:] in (("int",), ("str",)):  # one side of a union
        path = path[:-1]
        details = [detail for detail in details if detail["loc"][:-1] != first["loc"][:-1]] + [first]
        first["msg"] = "must be an integer or a text"
    where = ""
    line = next((lines[path[:n]] for n in range(len(path), -1, -1) if lines and path[:n] in lines), None)
    if line == 0:  # see Config._checked
        where = "--set "
    elif file is not None:
        where = f"{file}:{line}: " if line else f"{file}: "
    name = dotted(prefix, *map(str, path))
    value = first.get("input")
    kind = first["type"]
    if kind in ("extra_forbidden", "no_such_attribute"):
        section = _section_at(schema, path[:-1], first["loc"])
        problem = f"unknown key{nearest(str(path[-1]), list(section.model_fields) if section else [])}"
    elif kind == "missing":
        problem = "required, and not given"
    elif kind.startswith("union_tag"):
        problem = no_family(value)
    elif kind == "string_pattern_mismatch" and path[-1:] == ("device",):
        problem = f"must be auto, cpu, gpu, mps, cuda or cuda:N, not {value!r}"
    elif kind == "value_error":
        problem = str(first["ctx"]["error"])
    else:
        message = first["msg"].replace("Input should be", "must be").replace("a valid ", "a ")
        message = message.replace("a integer", "an integer")
        allowed = str(first.get("ctx", {}).get("expected", ""))
        choices = [choice.strip(" '") for choice in allowed.replace(" or ", ", ").split(",")]
        close = difflib.get_close_matches(value, choices, 1) if isinstance(value, str) and allowed else []
        problem = f"{message}, not {value!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{where}{name + ': ' if name else ''}{problem}{more}"


def _section_at(schema: type[Section], path: tuple[Any, ...], loc: tuple[Any, ...]) -> type[Section] | None:
    """The section class that stands at a key path."""
    section: type[Section] | None = schema
    for part in path:
        if section is Config and part in ("model", "data"):
            section = next((_TAGS[tag] for tag in loc if tag in _TAGS), None)
            continue
        annotation = section.model_fields[part].annotation if section and part in section.model_fields else None
        section = annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
    return section
