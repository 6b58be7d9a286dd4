"""Other names of weights: the argument `rename` of `icenet.from_torch`, `icenet.to_torch` and the parity tool.

A mapping has names of PyTorch on the left and names of the MLX module on the right, for both directions of copying:

    {"encoder.ln_f": "encoder.norm"}             a layer and everything in it, or one weight
    {"module": "", "": "backbone"}               removes or adds a first part of all names
    {"h.*.attn": "blocks.*.attention"}           `*` is any text without a dot
    {"lstm.*_l1": "layers.1.*_l0"}               the second layer of torch.nn.LSTM
    {"head.counter": None}                       this weight is left out

A mapping with names of the MLX module on the left is read from right to left, if its names leave no doubt. A function
takes each name of PyTorch and returns the name of the MLX module, or None to leave the weight out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from icenet.core.errors import UsageError

Rename: TypeAlias = Mapping[str, "str | None"] | Callable[[str], "str | None"] | None


def apply_rename(rename: Rename, names: Iterable[str]) -> dict[str, str | None]:
    """Returns the new name of each name; None for those that are left out.

    The most specific entry of a mapping applies: the one with the most characters that are not wildcards.

    Args:
        rename: See the text at the top of this module.
        names: Names of PyTorch: of weights, or of layers.

    Raises:
        UsageError: It is neither a mapping nor a function, an entry is not text, an entry matches no name, or the
            function fails or returns something else.
    """
    names = list(names)
    if rename is None:
        return {name: name for name in names}
    if isinstance(rename, Mapping):
        return _apply_mapping(rename, names)
    if callable(rename):
        return {name: call_rename(rename, name) for name in names}
    raise UsageError(f"rename: must be a dict or a function of a name, not a {type(rename).__name__}")


def from_torch_names(rename: Rename, torch_names: Iterable[str], mlx_names: Iterable[str]) -> Rename:
    """Returns a mapping with the names of PyTorch on the left.

    It is changed only if its left sides are not all names of PyTorch, but all are names of the MLX module, and its
    right sides are names of PyTorch.

    Args:
        rename: As the user gives it.
        torch_names: Names of PyTorch.
        mlx_names: Names of the MLX module.
    """
    if not isinstance(rename, Mapping):
        return rename
    swapped = {value: key for key, value in rename.items() if isinstance(value, str) and isinstance(key, str)}
    if len(swapped) < len(rename) or any(left.count("*") != right.count("*") for left, right in swapped.items()):
        return rename
    theirs, ours = list(torch_names), list(mlx_names)
    is_swapped = not all_match(rename, theirs) and all_match(rename, ours) and all_match(swapped, theirs)
    return swapped if is_swapped else rename


def all_match(keys: Iterable[str], names: list[str]) -> bool:
    """Returns whether each key of a mapping matches a name, or is the first part of one."""
    return all(any(_pattern(key, None).match(name) for name in names) for key in keys)


def call_rename(function: Callable[[str], str | None], name: str) -> str | None:
    """Returns the new name that a user's function gives; see `apply_rename`."""
    try:
        new = function(name)
    except Exception as error:  # of the user's function
        raise UsageError(f"rename: the function raises {type(error).__name__} for {name!r}: {error}") from error
    if new is not None and not isinstance(new, str):
        raise UsageError(f"rename: the function returns a {type(new).__name__} for {name!r}; return text or None")
    return new


def _apply_mapping(rename: Mapping[str, str | None], names: list[str]) -> dict[str, str | None]:
    rules = [(_pattern(key, value), key, value) for key, value in rename.items()]
    rules.sort(key=lambda rule: -len(rule[1].replace("*", "")))
    found: dict[str, str | None] = {}
    matched: set[str] = set()
    for name in names:
        found[name] = name
        hits = [(match, key, value) for pattern, key, value in rules if (match := pattern.match(name))]
        matched.update(key for _, key, _ in hits)
        if hits:
            match, _, value = hits[0]
            found[name] = None if value is None else _replaced(match, value.strip("."))
    if unused := [key for key in rename if key not in matched]:
        first = f"the first one is {names[0]!r}" if names else "there are none"
        raise UsageError(f"rename: {', '.join(map(repr, unused))}: matches no name of PyTorch; {first}")
    return found


def _pattern(key: str, value: str | None) -> re.Pattern[str]:
    if not isinstance(key, str) or not (value is None or isinstance(value, str)):
        raise UsageError(f"rename: {key!r}: {value!r}: give two names, or a name and None")
    if value is not None and value.count("*") > key.count("*"):
        raise UsageError(f"rename: {key!r}: {value!r}: the right side has more wildcards than the left side")
    key = key.rstrip(".")
    text = "([^.]+)".join(re.escape(part) for part in key.split("*"))
    return re.compile(rf"{text}(?:\.|$)" if key else "")


def _replaced(match: re.Match[str], value: str) -> str:
    for part in match.groups():
        value = value.replace("*", part, 1)
    rest = match.string[match.end() :]
    return f"{value}.{rest}" if value and rest else value or rest
