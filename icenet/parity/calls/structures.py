"""Structures of arrays that modules take and return: nested tuples, lists, dicts, named tuples and dataclasses."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from icenet.parity.trace import Value


@dataclass(frozen=True)
class Slot:
    """The place of an array in a structure."""

    index: int


def map_leaves(item: Any, function: Callable[[Any], Any]) -> Any:
    """Returns nested tuples, lists, dicts and dataclasses with `function(leaf)` in place of each leaf."""
    if callable(item):  # a module, which is a dict in MLX
        return function(item)
    if isinstance(item, dict):
        new = copy.copy(item)
        for key, value in item.items():
            new[key] = map_leaves(value, function)
        return new
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        # not by its constructor, which may check the arrays, as that of a PackedSequence does
        return tuple.__new__(type(item), [map_leaves(value, function) for value in item])
    if type(item) in (tuple, list):
        return type(item)(map_leaves(value, function) for value in item)
    if is_dataclass(item) and not isinstance(item, (type, Slot, Value)):
        changed: Any = copy.copy(item)
        for part in fields(item):
            object.__setattr__(changed, part.name, map_leaves(getattr(item, part.name), function))
        return changed
    return function(item)


def leaves(item: Any) -> list[Any]:
    """Returns the leaves of a structure, in order."""
    found: list[Any] = []
    map_leaves(item, found.append)
    return found


def take_apart(item: Any, array_type: type) -> tuple[Any, list[Any]]:
    """Returns a structure with a `Slot` in place of each array, and the arrays."""
    arrays: list[Any] = []

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, array_type):
            return leaf
        arrays.append(leaf)
        return Slot(len(arrays) - 1)

    return map_leaves(item, take), arrays


def arrays_of(item: Any, array_type: type) -> list[Any]:
    """Returns the arrays of a structure, in order."""
    return take_apart(item, array_type)[1]


def rebuild(item: Any, arrays: list[Any]) -> Any:
    """Returns a structure with arrays in place of its slots."""
    return map_leaves(item, lambda leaf: arrays[leaf.index] if isinstance(leaf, Slot) else leaf)


def argument_names(given: Any) -> list[str]:
    """Returns the name of each array of `(args, kwargs)`: `0`, `mask`, or `0[1]`, `0[state]` in a nested argument."""
    found: list[str] = []
    args, kwargs = given
    for name, item in (*((str(index), item) for index, item in enumerate(args)), *kwargs.items()):
        slots = [leaf for leaf in leaves(item) if isinstance(leaf, Slot)]
        parts = named_slots(item) or range(len(slots))
        found += [name] if isinstance(item, Slot) else [f"{name}[{part}]" for part in parts]
    return found


def named_slots(item: Any) -> list[str]:
    """Returns the keys or fields on the way to each slot of a structure, as `boxes[1]`; empty if one has none."""
    keys = keys_of(item)
    names = [re.sub(r'\["([^"]*)"\]', r".\1", keys[index]).removeprefix(".") for index in sorted(keys)]
    return names if len(names) == sum(isinstance(leaf, Slot) for leaf in leaves(item)) else []


def numbers_by_name(names: Sequence[str], others: Sequence[str], count: int) -> list[int]:
    """Returns the number among the others of each of `count` arrays: of equal name, or the same number.

    Args:
        names, others: The names of the arrays on each side; empty if they have none.
        count: Number of arrays.
    """
    if len(names) == count and sorted(names) == sorted(others) and len(set(names)) == count:
        return [others.index(name) for name in names]
    return list(range(count))


def keys_of(item: Any, path: str = "", is_named: bool = False) -> dict[int, str]:
    """Returns where each slot of a structure is, such as `["boxes"][1]`, if there is a key or a field on the way."""
    if isinstance(item, Slot):
        return {item.index: path} if is_named else {}
    if isinstance(item, dict):
        parts = [(f'["{key}"]' if isinstance(key, str) else f"[{key}]", value) for key, value in item.items()]
    elif isinstance(item, tuple) and hasattr(item, "_fields"):
        parts = [(f".{name}", value) for name, value in zip(item._fields, item, strict=True)]
    elif type(item) in (tuple, list):
        inner = enumerate(item)
        return {k: v for n, value in inner for k, v in keys_of(value, f"{path}[{n}]", is_named).items()}
    elif is_dataclass(item) and not isinstance(item, (type, Value)):
        parts = [(f".{part.name}", getattr(item, part.name)) for part in fields(item)]
    else:
        return {}
    return {k: v for name, value in parts for k, v in keys_of(value, path + name, True).items()}


def numbers(item: Any, path: str = "") -> dict[str, float]:
    """Returns the Python numbers in a structure, by the keys, fields and places on the way to them."""
    if isinstance(item, (bool, int, float)):
        return {path: item}
    if isinstance(item, dict):
        parts = [(f"[{key!r}]", value) for key, value in item.items()]
    elif isinstance(item, (tuple, list)):
        parts = [(f"[{index}]", value) for index, value in enumerate(item)]
    elif is_dataclass(item) and not isinstance(item, (type, Slot, Value)):
        parts = [(f"[{part.name!r}]", getattr(item, part.name)) for part in fields(item)]
    else:
        return {}
    return {name: number for key, value in parts for name, number in numbers(value, path + key).items()}


def is_constant(leaf: Any) -> bool:
    """Returns whether a leaf is one that no call changes: a slot, a number, a text, a dtype, a function."""
    return (
        leaf is None
        or isinstance(leaf, (Slot, str, bytes, bool, int, float, complex, slice, np.ndarray, np.generic))
        or type(leaf).__name__ in ("dtype", "Dtype", "device", "Device", "DtypeCategory", "layout", "memory_format")
        or callable(leaf)
    )
