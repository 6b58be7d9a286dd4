"""Which arrays a model has, to notice later whether they have changed, PyTorch."""

from __future__ import annotations

import operator

from torch import nn


class Snapshot:
    """The arrays of a model from which a copy was made.

    A change in place changes the copy, too, because it shares the memory. New memory has another address.
    """

    def __init__(self, model: nn.Module, copy: nn.Module) -> None:
        holders = [
            holder for module in model.modules() for holder in (module._modules, module._parameters, module._buffers)
        ]
        self._parts = [(holder, list(holder.values())) for holder in holders]
        self._tensors = [*model.parameters(), *model.buffers()]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    def is_current(self) -> bool:
        """Returns whether the model still has these arrays."""
        for holder, before in self._parts:
            if len(holder) != len(before) or not all(map(operator.is_, holder.values(), before)):
                return False
        return self._addresses == [tensor.data_ptr() for tensor in self._tensors]
