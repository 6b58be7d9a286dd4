"""What a module computes itself, apart from its weights and the modules within it: its class and its attributes.

Blocks of a deep model are mostly instances of one class. A replay leaves out the modules that a block calls, so it
computes the same function for each block whose attributes are equal, and one replay shows what the others would.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from icenet.parity.calls.pairs import Pair
from icenet.parity.state import Comparison


def code_of(c: Comparison, pair: Pair) -> Hashable | None:
    """Returns a key that is equal for calls of modules which compute the same function themselves, on both sides.

    Returns:
        None if a module has arrays of its own, or the reference is recorded: then no other is known to be the same.
    """
    if not c.computes_reference:
        return None
    keys = [_key(vars(side.modules[path]) | _items(side.modules[path])) for side, path in _places(c, pair)]
    if any(key is None for key in keys):
        return None
    classes = tuple(type(side.modules[path]) for side, path in _places(c, pair))
    children = tuple(child.path.removeprefix(pair.path) for child in pair.children)
    return classes, tuple(keys), children, tuple(item.array.ndim for item in pair.inputs("b"))


def _places(c: Comparison, pair: Pair) -> tuple[tuple[Any, str], tuple[Any, str]]:
    return (c.a, pair.a.path), (c.b, pair.path)


def _items(module: Any) -> Mapping[str, Any]:
    """Returns the entries of a module of MLX, which is a dict."""
    return dict(module) if isinstance(module, dict) else {}


def _key(item: Any) -> Hashable | None:
    """Returns a key of an attribute that is equal for equal ones; None if it holds an array."""
    if item is None or isinstance(item, (bool, int, float, complex, str, bytes)):
        return type(item).__name__, repr(item)
    if hasattr(item, "shape"):
        return None
    if callable(getattr(item, "train", None)):  # a module within it
        return "module", id(type(item))
    if isinstance(item, Mapping):
        found = [(name, _key(part)) for name, part in item.items()]
        return None if any(key is None for _, key in found) else tuple(found)
    if isinstance(item, (list, tuple)):
        parts = [_key(part) for part in item]
        return None if None in parts else (type(item).__name__, *parts)
    if isinstance(item, (set, frozenset)) and not item:
        return type(item).__name__
    return id(item)
