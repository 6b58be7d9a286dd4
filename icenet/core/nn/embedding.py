"""Ids outside the table of an embedding: how both backends find them. PyTorch refuses them, MLX does not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from icenet.core.errors import OutsideTableError
from icenet.core.nn.classes import change_classes


class CheckedIds:
    """The part of an embedding that is the same on both backends: the check of its ids, once `guard` has begun it.

    To read ids on the host is to wait for the device. So they are read where the layer gets an array of a new shape,
    which finds positions that the table lacks, or in each call with `_reads_all`.
    """

    _path: str | None = None
    """Path of the layer in its model; None if it does not check."""
    _reads_all: bool = False
    _shapes: set[tuple[int, ...]]

    def check_ids(self, ids: Any, rows: int, to_host: Callable[[Any], NDArray[Any] | None]) -> None:
        """Reads the ids of a call, if it must, and checks them.

        Args:
            ids: An array of integers of the framework.
            rows: Number of rows of the table.
            to_host: Returns an array as numpy, or None if its values are unknown.

        Raises:
            OutsideTableError: An id is negative or too large.
        """
        shape = tuple(ids.shape)
        if not self._reads_all and shape in self._shapes:
            return
        values = to_host(ids)
        if values is None:
            return
        outside = values[(values < 0) | (values >= rows)]
        if outside.size:
            name = self._path or type(self).__name__
            raise OutsideTableError(
                f"{name}: the id {outside.flat[0]} is outside its table of {rows} rows (0 to {rows - 1}); "
                "correct the ids, or give the embedding more rows"
            )
        self._shapes.add(shape)


def guard(modules: Iterable[tuple[str, Any]], checked: Mapping[type, type], reads_all: bool = False) -> None:
    """Makes the embeddings of a model check their ids, in place; subclasses of the framework's layer do not.

    Args:
        modules: All modules of a model, by path.
        checked: The class that checks its ids, by the framework's class.
        reads_all: Whether they read the ids of each call.
    """
    found = list(modules)
    change_classes(found, checked)
    for path, module in found:
        if isinstance(module, CheckedIds):
            if module._path is None:
                module._path, module._shapes = path, set()
            module._reads_all = reads_all


@contextlib.contextmanager
def reading(modules: Iterable[tuple[str, Any]], checked: Mapping[type, type]) -> Iterator[None]:
    """Makes the embeddings of any model read the ids of each call while the context is open; see `guard`."""
    found = list(modules)
    before = {id(module): (module, type(module), dict(module.__dict__)) for _, module in found}
    guard(found, checked, reads_all=True)
    try:
        yield
    finally:
        for module, own_class, attributes in before.values():
            if isinstance(module, CheckedIds):
                object.__setattr__(module, "__class__", own_class)
                for name in ("_path", "_shapes", "_reads_all"):
                    module.__dict__.pop(name, None)
                    if name in attributes:
                        module.__dict__[name] = attributes[name]
