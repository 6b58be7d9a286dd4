"""Reads YAML safely, with the line number of each key and every value as it is written, and writes it."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from icenet.core.config import scalars
from icenet.core.config.scalars import Scalar
from icenet.core.errors import ConfigError
from icenet.core.messages import first_line

Lines = dict[tuple[Any, ...], int]
"""Line number of each key and of each item of a list, by its path from the root."""

_MAX_BYTES = 1 << 20
_MAX_NODES = 20_000  # aliases are expanded, so a few lines of YAML can describe billions of nodes
_MAX_DEPTH = 100
_PLAIN = "plain"
_YAML_ORG = "tag:yaml.org,2002:"


class InvalidYAMLError(Exception):
    """A text that is not YAML, or not allowed in a configuration."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


class _Loader(yaml.SafeLoader):
    """Parses YAML into nodes. A value without quotes and without a tag gets the tag `plain`, not a type."""

    num_nodes = depth = 0

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: tuple[bool, bool]) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return _PLAIN
        return str(super().resolve(kind, value, implicit))

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.num_nodes += 1
        if self.num_nodes > _MAX_NODES:
            raise _too_many()
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise InvalidYAMLError("nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of YAML 1.1 or 1.2, or `scalars.natural`, would take for another type."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        try:
            has_type = not isinstance(scalars.natural(text), str)
        except ValueError:
            has_type = True
        return self.represent_scalar(f"{_YAML_ORG}str", text, style="'" if has_type else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def read(path: Path) -> tuple[dict[str, Any], Lines]:
    """Reads a YAML mapping.

    Returns:
        Its values and the line number of each key and item. A value is a mapping, a list or a `Scalar`; a value with
        a tag such as `!!float` has the type of the tag.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        if not path.is_file():  # a pipe or /dev/zero would be read without end
            raise ConfigError(f"{path}: is not a regular file; a configuration is a YAML file")
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{path}: larger than 1 MB, the limit of a configuration")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: cannot be read: not UTF-8 text (line {line}); save it as UTF-8") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> tuple[dict[str, Any], Lines]:
    """Parses a YAML mapping like `read`. `name` is the source in error messages."""
    lines: Lines = {}
    try:
        values = _parse(text, lines)
    except InvalidYAMLError as error:
        where = f":{error.line}" if error.line else ""
        raise ConfigError(f"{name}{where}: {error}") from None
    if values is None or (isinstance(values, Scalar) and values in scalars.NULLS and values.style == "plain"):
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: must be a mapping of sections (model:, training:, ...)")
    return values, lines


def value(text: str) -> Any:
    """Parses one value of YAML: a mapping, a list or a `Scalar`.

    Raises:
        InvalidYAMLError: It is not YAML.
    """
    return _parse(text, {})


def _parse(text: str, lines: Lines) -> Any:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _construct(loader, node, (), lines, [0])
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise _syntax_error(error, text) from None
    except RecursionError:  # of an alias that contains itself
        raise InvalidYAMLError("nested too deeply") from None


def _syntax_error(error: yaml.YAMLError, text: str) -> InvalidYAMLError:
    """Returns the error of PyYAML as one line, and how to correct frequent ones."""
    problem = getattr(error, "problem", None) or first_line(error)
    context = getattr(error, "context", None) or ""
    marks = [getattr(error, "problem_mark", None), getattr(error, "context_mark", None)]
    remedy = ""
    if "quoted scalar" in context and "end" in problem:
        marks.reverse()  # the line on which the quotation begins
        remedy = "a quotation mark is not closed"
    elif "another document" in problem:
        remedy = "a configuration is one document: remove ---"
    elif "'\\t'" in problem:
        remedy = "indent with spaces, not with tabs"
    elif "mapping values" in problem or "<block end>" in problem or "simple key" in context:
        remedy = "align the keys of a section, and put a text that contains quotes or ': ' in quotes"
    elif re.search("cannot start|not allowed here|node content|undefined alias", problem) or re.search(
        "alias|anchor|tag|directive", context
    ):
        remedy = "put a text that begins with a special character in quotes"
    line = next((mark.line + 1 for mark in marks if mark), None)
    for number in (line, line - 1) if line else ():  # the value of the line before may continue there
        if names := scalars.strange_spaces("".join(text.splitlines()[number - 1 : number])):
            remedy = f"line {number} contains {names}: write a space instead"
            break
    if isinstance(error, yaml.reader.ReaderError):
        problem = f"{problem} (line {text.count(chr(10), 0, error.position) + 1})"
    return InvalidYAMLError(f"not valid YAML: {problem}{remedy and f'; {remedy}'}", line)


def _construct(loader: _Loader, node: yaml.Node, path: tuple[Any, ...], lines: Lines, count: list[int]) -> Any:
    """Returns the value of a node, and adds the lines of its keys and items to `lines`. `count[0]` counts nodes."""
    count[0] += 1
    if count[0] > _MAX_NODES:
        raise _too_many()
    if isinstance(node, yaml.MappingNode):
        _check_tag(node, "map")
        return _construct_mapping(loader, node, path, lines, count)
    if isinstance(node, yaml.SequenceNode):
        _check_tag(node, "seq")
        items = []
        for i, item in enumerate(node.value):
            here = (*path, i)
            lines[here] = item.start_mark.line + 1
            items.append(_construct(loader, item, here, lines, count))
        return items
    assert isinstance(node, yaml.ScalarNode)
    return _construct_scalar(loader, node)


def _construct_mapping(
    loader: _Loader, node: yaml.MappingNode, path: tuple[Any, ...], lines: Lines, count: list[int]
) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    merged_lines: Lines = {}
    first_lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = _key(key_node, line)
        if key in first_lines:
            raise InvalidYAMLError(f"duplicate key {key}; the first is on line {first_lines[key]}", line)
        first_lines[key] = line
        if key == "<<" and key_node.tag == _PLAIN:
            sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for source in reversed(sources):  # of several, the first one counts
                if not isinstance(source, yaml.MappingNode):
                    raise InvalidYAMLError("<< takes a mapping, such as <<: *name", line)
                merged |= _construct(loader, source, path, merged_lines, count)
        else:
            here = (*path, key)
            lines[here] = line
            mapping[key] = _construct(loader, value_node, here, lines, count)
    for key in merged:
        if key not in mapping:
            lines |= {place: line for place, line in merged_lines.items() if place[: len(path) + 1] == (*path, key)}
    return {**merged, **mapping}


def _key(node: yaml.Node, line: int) -> str:
    """Returns the text of a key, which a reader of YAML would take for a text."""
    try:
        is_text = node.tag == f"{_YAML_ORG}str"
        if is_text or (node.tag == _PLAIN and isinstance(scalars.natural(node.value), str)):
            return str(node.value)
    except ValueError:  # looks like a number or a date
        pass
    shown = (node.value or "''") if isinstance(node, yaml.ScalarNode) else "in brackets"
    raise InvalidYAMLError(f"the key {shown} must be a string; put it in quotes", line)


def _construct_scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    if node.tag == _PLAIN:
        return Scalar(node.value, "plain")
    line = node.start_mark.line + 1
    kind = node.tag.removeprefix(_YAML_ORG)
    if kind == "str":
        return Scalar(node.value, "quoted")
    try:
        if kind == "binary":
            return loader.construct_object(node)
        if kind in _TAGS:
            found = scalars.natural(node.value)
            found = float(found) if kind == "float" and type(found) is int else found
            if isinstance(found, _TAGS[kind]) and (kind == "bool") is isinstance(found, bool):
                return found
            raise ValueError(f"{node.value} is not of the type !!{kind}")
    except (ValueError, yaml.YAMLError) as error:
        raise InvalidYAMLError(str(getattr(error, "problem", None) or error), line) from None
    raise _tag_not_allowed(node)


_TAGS = {"int": int, "float": float, "bool": bool, "null": type(None), "timestamp": datetime.date}


def _check_tag(node: yaml.Node, kind: str) -> None:
    if node.tag != f"{_YAML_ORG}{kind}":
        raise _tag_not_allowed(node)


def _tag_not_allowed(node: yaml.Node) -> InvalidYAMLError:
    remedy = "; put a text that begins with ! in quotes" if isinstance(node, yaml.ScalarNode) else ""
    problem = f"not valid YAML: the tag {node.tag!r} is not allowed{remedy}"
    return InvalidYAMLError(problem, node.start_mark.line + 1)


def _too_many() -> InvalidYAMLError:
    return InvalidYAMLError(f"more than {_MAX_NODES:,} values, the limit of a configuration")


def dump(values: Mapping[str, Any]) -> str:
    """Returns a tree of plain values as YAML, in the given order."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, width=100)


def copy_tree(values: Any) -> Any:
    """Returns a copy in which every mapping is a new dict."""
    return {key: copy_tree(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def parse_override(text: str) -> tuple[tuple[str, ...], Scalar]:
    """Splits `training.learning_rate=1e-3` into the path of the key and the text of the value.

    Spaces around the `=` are not part of the value.

    Raises:
        ConfigError: There is no `=`, or no key.
    """
    key, equals, given = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {text}: must be key=value, such as training.learning_rate=1e-3")
    return path, Scalar(given.lstrip(" "), "set")


def assign(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> tuple[tuple[str, ...], bool]:
    """Sets the value at the path of a key and creates missing sections.

    Returns:
        The path of what was replaced (`path`, or the path of a plain value that became a section), and whether the
        key had no value before.
    """
    replaced = path
    for depth, part in enumerate(path[:-1]):
        below = tree.get(part)
        if isinstance(below, Scalar) and below.lstrip().startswith("{"):  # an earlier --set SECTION={...}
            try:
                below = tree[part] = _parse(below, {})
            except InvalidYAMLError:
                return path[: depth + 1], True  # which is reported when its type is known
        if not isinstance(below, dict):
            replaced = min(replaced, path[: depth + 1], key=len)
            below = tree[part] = {}
        tree = below
    is_new = path[-1] not in tree
    tree[path[-1]] = value
    return replaced, is_new
