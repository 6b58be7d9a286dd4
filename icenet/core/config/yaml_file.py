"""YAML in and out: safely loaded, each key with the line it stands on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from icenet.core.errors import ConfigError

Lines = dict[tuple[Any, ...], int]

_MAX_BYTES = 1 << 20
_MAX_NODES = 20_000  # aliases are followed, so a few lines of YAML can stand for billions of nodes


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: PyYAML reads 1e-3 as a text otherwise."""


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
    """Quotes every text that `_Loader` would read as something else."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def read(path: Path) -> tuple[dict[str, Any], Lines]:
    """Reads a YAML mapping; gives its values and the line of each key path.

    Raises:
        ConfigError: not there, not readable, not YAML, or not a mapping.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than 1 MB, which no configuration is")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text in UTF-8"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> tuple[dict[str, Any], Lines]:
    """As `read`, from a text; `name` is what errors call it."""
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
        raise ConfigError(f"{name}: nested too deeply to be a configuration") from None
    except ValueError as error:
        line, _, problem = str(error).partition(": ")
        raise ConfigError(f"{name}:{line}: {problem}" if line.isdigit() else f"{name}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: must be a mapping of sections (model:, training:, ...)")
    return values, lines


def _construct(loader: _Loader, node: yaml.Node, path: tuple[Any, ...], lines: Lines, count: list[int]) -> Any:
    count[0] += 1
    if count[0] > _MAX_NODES:
        raise ValueError("stands for too many values to be a configuration")
    plain = {"mapping": "tag:yaml.org,2002:map", "sequence": "tag:yaml.org,2002:seq"}
    if node.tag != plain.get(getattr(node, "id", ""), node.tag):
        raise ValueError(f"{node.start_mark.line + 1}: the tag {node.tag} has no place in a configuration")
    if isinstance(node, yaml.MappingNode):
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ValueError(f"{line}: the key {key!r} must be a text")
            if key in mapping:
                raise ValueError(f"{line}: the key {key} stands here twice")
            here = (*path, key)
            lines[here] = line
            mapping[key] = _construct(loader, value_node, here, lines, count)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*path, i), lines, count) for i, item in enumerate(node.value)]
    return loader.construct_object(node)


def dump(values: Mapping[str, Any]) -> str:
    """YAML text of a tree of plain values, in the order given."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, width=100)


def copy_tree(values: Any) -> Any:
    """A copy in which every mapping is a new dict."""
    return {key: copy_tree(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """`training.learning_rate=1e-3` as a key path and a value, the value read as YAML."""
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {text}: must be key=value, such as training.learning_rate=1e-3")
    try:
        return path, yaml.load(value, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        raise ConfigError(f"--set {text}: the value is not valid YAML; put it in quotes") from None


def assign(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> tuple[str, ...]:
    """Puts a value at a key path, making the sections on the way; gives the path of what it replaced."""
    replaced = path
    for depth, part in enumerate(path[:-1]):
        below = tree.get(part)
        if not isinstance(below, dict):
            replaced = min(replaced, path[: depth + 1], key=len)
            below = tree[part] = {}
        tree = below
    tree[path[-1]] = value
    return replaced
