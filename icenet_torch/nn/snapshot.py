"""What a copy of a model depends on, to notice later whether it has changed, PyTorch."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import nn

CHANGING = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
"""Attributes of a module to which entries may be added later."""


class Snapshot:
    """The arrays, modules and other attributes of a model from which a copy was made.

    A change of an array in place changes the copy, too, because it shares the memory. New memory has another address.
    """

    def __init__(self, model: nn.Module, copy: nn.Module) -> None:
        modules = list(model.modules())
        holders = [holder for module in modules for holder in _holders(module)]
        holders += [vars(module) for module in modules if module is not model]  # the model's own would make a cycle
        self._parts = [(holder, _values(holder)) for holder in holders]
        self._own = _own_values(model)
        self._tensors = [*model.parameters(), *model.buffers()]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    def is_current(self, model: nn.Module) -> bool:
        """Returns whether the model still has these arrays and attributes."""
        for holder, before in self._parts:
            if len(holder) != len(before) or not all(map(operator.is_, _values(holder), before)):
                return False
        own = _own_values(model)
        if len(own) != len(self._own) or not all(map(operator.is_, own, self._own)):
            return False
        return self._addresses == [tensor.data_ptr() for tensor in self._tensors]


def _holders(module: nn.Module) -> Iterator[Any]:
    """Yields the dicts and lists of a module."""
    for name, value in vars(module).items():
        if isinstance(value, (dict, list)) and (value or name in CHANGING):
            yield value


def _values(holder: Any) -> list[Any]:
    return list(holder.values()) if isinstance(holder, dict) else list(holder)


def _own_values(model: nn.Module) -> list[Any]:
    """Returns the attributes of the model itself."""
    return [value for name, value in vars(model).items() if name != "_generation_copy"]
