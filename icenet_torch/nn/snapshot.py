"""Which arrays a model has, to notice later whether they have changed, PyTorch."""

from __future__ import annotations

from torch import nn


class Snapshot:
    """The arrays of a model from which a copy was made.

    A change in place changes the copy, too, because it shares the memory. New memory has another address.
    """

    def __init__(self, model: nn.Module, copy: nn.Module) -> None:
        self._addresses = _addresses(model)

    def is_of(self, model: nn.Module) -> bool:
        """Returns whether the model still has these arrays."""
        return self._addresses == _addresses(model)


def _addresses(model: nn.Module) -> list[int]:
    return [array.data_ptr() for array in (*model.parameters(), *model.buffers())]
