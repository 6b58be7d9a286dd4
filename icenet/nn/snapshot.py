"""What a copy of a model depends on, to notice later whether it has changed, MLX."""

from __future__ import annotations

import copy as copying
import operator
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from icenet.nn.arrays import Array, address, on_cpu

INPUTS = 64
"""Number of arrays whose addresses one kernel writes."""


class Snapshot:
    """The arrays, modules and other attributes of a model from which a copy was made.

    A module's new array is another object, which the copy does not have. A change in place, such as `weight *= 2`, is
    a new address: the old one is not used again, because the snapshot holds it.
    """

    def __init__(self, model: nn.Module, copy: nn.Module) -> None:
        holders = [holder for holder in _holders(model) if holder is not model]  # which would make a cycle
        holders += [vars(module) for module in holders if isinstance(module, nn.Module)]
        self._parts = [(holder, _values(holder)) for holder in holders]
        self._own = _own_values(model)
        # a captured step has the arrays themselves: a change in place is one of the object only
        shared = {id(value) for holder in _holders(copy) for value in _values(holder)} if on_cpu() else set()
        values = [*self._own, *(value for _, values in self._parts for value in values)]
        arrays = [value for value in values if isinstance(value, mx.array)]
        self._others = [array for array in arrays if id(array) not in shared]
        self._before = [copying.copy(array) for array in self._others]  # with the same memory
        self._known = None if _on_cuda() else _addresses(self._before)

    def is_current(self, model: nn.Module) -> bool:
        """Returns whether the model still has these arrays, with the same values, and these attributes."""
        for holder, before in self._parts:
            values = _values(holder)
            if len(values) != len(before) or not all(map(operator.is_, values, before)):
                return False
        own = _own_values(model)
        if len(own) != len(self._own) or not all(map(operator.is_, own, self._own)):
            return False
        try:
            return _addresses(self._others) == (self._known or _addresses(self._before))
        except RuntimeError:  # the kernel cannot be compiled here: then each request makes a copy
            return False


def _holders(value: Any) -> Iterator[Any]:
    """Yields the modules, dicts, lists and tuples of a model."""
    if isinstance(value, (dict, list, tuple)):  # a module is a dict
        yield value
        for part in _values(value):
            yield from _holders(part)


def _values(holder: Any) -> list[Any]:
    return list(holder.values()) if isinstance(holder, dict) else list(holder)


def _own_values(model: nn.Module) -> list[Any]:
    """Returns the parts and the attributes of the model itself."""
    return [*_values(model), *(value for name, value in vars(model).items() if name != "_generation_copy")]


def _on_cuda() -> bool:
    return not on_cpu() and bool(mx.cuda.is_available())


def _addresses(arrays: Sequence[Array]) -> list[int]:
    if not _on_cuda():
        return [address(array) for array in arrays]
    # reading an array on the host would move it out of the memory of the device
    found = []
    for start in range(0, len(arrays), INPUTS):
        part = arrays[start : start + INPUTS]
        [out] = _kernel()(
            inputs=[*part, *[part[-1]] * (INPUTS - len(part))],
            output_shapes=[(INPUTS,)],
            output_dtypes=[mx.uint64],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )
        found.append((out, len(part)))
    mx.eval([out for out, _ in found])
    return [int(address) for out, count in found for address in np.array(out)[:count]]


@lru_cache
def _kernel() -> Any:
    names = [f"array{index}" for index in range(INPUTS)]
    source = "\n".join(f"out[{index}] = (uint64_t){name};" for index, name in enumerate(names))
    return mx.fast.cuda_kernel("icenet_addresses", names, ["out"], source, ensure_row_contiguous=False)
