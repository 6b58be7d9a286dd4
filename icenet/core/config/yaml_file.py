"""Reads YAML safely, with the line number of each key, and writes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from icenet.core.errors import ConfigError

Lines = dict[tuple[Any, ...], int]
"""Line number of each key, by its path from the root."""

_MAX_BYTES = 1 << 20
_MAX_NODES = 20_000  # aliases are expanded, so a few lines of YAML can describe billions of nodes


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does: PyYAML reads 1e-3 as a string."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*)?\.[0-9_]+(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*\.?[eE][-+]?[0-9]+"
        r"|[-+]?[0-9][0-9_]*\.|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that `_Loader` would read as another type."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


class _Invalid(Exception):
    """The YAML is well-formed, but not allowed in a configuration."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


def read(path: Path) -> tuple[dict[str, Any], Lines]:
    """Reads a YAML mapping.

    Returns:
        Its values and the line number of each key.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than 1 MB, the limit of a configuration")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> tuple[dict[str, Any], Lines]:
    """Parses a YAML mapping like `read`. `name` is the source in error messages."""
    lines: Lines = {}
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            values = {} if node is None else _construct(loader, node, (), lines, [0])
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{name}{where}: not valid YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    except _Invalid as error:
        where = f":{error.line}" if error.line else ""
        raise ConfigError(f"{name}{where}: {error}") from None
    except ValueError as error:  # of a scalar, such as the date 2024-99-99
        raise ConfigError(f"{name}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: must be a mapping of sections (model:, training:, ...)")
    return values, lines


def _construct(loader: _Loader, node: yaml.Node, path: tuple[Any, ...], lines: Lines, count: list[int]) -> Any:
    """Returns the value of a node, and adds the line numbers of its keys to `lines`. `count[0]` counts nodes."""
    count[0] += 1
    if count[0] > _MAX_NODES:
        raise _Invalid(f"more than {_MAX_NODES:,} values, the limit of a configuration")
    plain = {"mapping": "tag:yaml.org,2002:map", "sequence": "tag:yaml.org,2002:seq"}
    if node.tag != plain.get(getattr(node, "id", ""), node.tag):
        raise _Invalid(f"the tag {node.tag} is not allowed", node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise _Invalid(f"the key {key!r} must be a string", line)
            if key in mapping:
                raise _Invalid(f"duplicate key {key}", line)
            here = (*path, key)
            lines[here] = line
            mapping[key] = _construct(loader, value_node, here, lines, count)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*path, i), lines, count) for i, item in enumerate(node.value)]
    return loader.construct_object(node)


def dump(values: Mapping[str, Any]) -> str:
    """Returns a tree of plain values as YAML, in the given order."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, width=100)


def copy_tree(values: Any) -> Any:
    """Returns a copy in which every mapping is a new dict."""
    return {key: copy_tree(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """Parses `training.learning_rate=1e-3` into the path of the key and the value, which is read as YAML.

    Raises:
        ConfigError: There is no `=`, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {text}: must be key=value, such as training.learning_rate=1e-3")
    try:
        return path, yaml.load(value, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        raise ConfigError(f"--set {text}: the value is not valid YAML; put it in quotes") from None


def assign(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> tuple[str, ...]:
    """Sets the value at the path of a key and creates missing sections.

    Returns:
        The path of what was replaced: `path`, or the path of a plain value that became a section.
    """
    replaced = path
    for depth, part in enumerate(path[:-1]):
        below = tree.get(part)
        if not isinstance(below, dict):
            replaced = min(replaced, path[: depth + 1], key=len)
            below = tree[part] = {}
        tree = below
    tree[path[-1]] = value
    return replaced
