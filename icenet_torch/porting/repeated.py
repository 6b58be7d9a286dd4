"""Arguments of a module that are one tensor in some calls of its class and several in others.

`self_attention(x, x, x)` and `attention(x, memory, memory)` are calls of one class. A graph has only values, so it
does not say which argument an operation reads in the first. An export with a view for each argument does.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


class Repeated:
    """Finds these arguments in the calls of an export.

    Args:
        apart: The classes whose arguments get a view each where they are one tensor.
    """

    def __init__(self, apart: frozenset[type] = frozenset()) -> None:
        self.apart = apart
        self.firsts: dict[type, dict[str, set[str]]] = {}
        """The first argument that is the same tensor, in each call, by the class and the argument."""

    def separated(self, called: nn.Module, bound: inspect.BoundArguments) -> tuple[Any, Any] | None:
        """Notes a call. Returns its arguments with views if its class has them apart, None for those that it has."""
        if called.forward.__module__.startswith("torch."):
            return None
        seen: dict[int, str] = {}
        changed = {}
        for name, value in bound.arguments.items():
            if not isinstance(value, torch.Tensor):
                continue
            first = seen.setdefault(id(value), name)
            self.firsts.setdefault(type(called), {}).setdefault(name, set()).add(first)
            if first != name and type(called) in self.apart:
                changed[name] = torch.ops.aten.alias.default(value)
        bound.arguments.update(changed)
        return (bound.args, bound.kwargs) if changed else None

    def varied(self) -> frozenset[type]:
        """Returns the classes of which calls differ in which arguments are the same tensor."""
        return frozenset(
            kind for kind, names in self.firsts.items() if any(len(firsts) > 1 for firsts in names.values())
        )
