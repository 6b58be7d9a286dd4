"""Which keys of a configuration the user wrote, as opposed to those that have their default value."""

from __future__ import annotations

from typing import Any

from icenet.core.config.section import Section

_SELECTORS = {"type", "kind"}
"""Keys that select the class of a section. They are always part of the tree."""


def tree(section: Section) -> dict[str, Any]:
    """Returns the keys that were set, and their values, as a tree for `Config.from_dict`.

    The result describes the same configuration as `Config.to_dict`, and the other keys stay unset.
    """
    found = {}
    for key, value in section:
        if isinstance(value, Section):
            found[key] = tree(value)
        elif key in _SELECTORS or key in section.model_fields_set or value != _default(section, key):
            found[key] = section.model_dump(mode="python", include={key})[key]
    return found


def is_written(section: Any, key: str) -> bool:
    """Returns whether the user wrote a key of a section, such as `training.beta1` of a `Config`.

    In a section with every key, as in the config.yaml of a run, a key with its default value does not count.
    """
    *sections, name = key.split(".")
    for part in sections:
        section = section[int(part)] if part.isdigit() else getattr(section, part)
    if name not in section.model_fields_set:
        return False
    return getattr(section, name) != _default(section, name) or not _is_complete(section)


def _default(section: Section, key: str) -> Any:
    """Returns the default value of a key; None for an option of a custom model, which has none."""
    field = type(section).model_fields.get(key)
    return field.get_default(call_default_factory=True) if field is not None else None


def _is_complete(section: Section) -> bool:
    return type(section).model_fields.keys() <= section.model_fields_set
