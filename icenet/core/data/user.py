"""A data set in a file of the user: `data.kind: my_data.py:MyData`."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.config import CustomDataConfig, custom, user_code
from icenet.core.data.text.packed import Batch
from icenet.core.errors import DataError, IceNetError
from icenet.core.messages import first_line

REQUIRED = ("inputs", "labels")
_LAST_BATCH = ("step", "batch_size", "checksum")
_CHECKED_BYTES = 1 << 20
"""Bytes of each array of which a checksum is taken, 0.4 ms."""


class UserDataset:
    """Adapts a class of the user to `icenet.core.data.datasets.Dataset`, and checks its batches.

    Args:
        data: An object with `train_batch(step, batch_size)`, and optionally with `validation_batches(batch_size,
            count)`, `steps_per_epoch(batch_size)` and the attributes of `Dataset`.
        name: Its name in messages.
        identity: What the data depends on besides the object's own `fingerprint`.
    """

    def __init__(self, data: Any, name: str, identity: str) -> None:
        self.data = data
        self.description = str(getattr(data, "description", name))
        self.unit = str(getattr(data, "unit", "row"))
        self.notes: Sequence[str] = list(getattr(data, "notes", ()))
        self.summary: Sequence[str] = list(getattr(data, "summary", ()))
        self.items_per_row = int(getattr(data, "items_per_row", 1))
        self.facts: dict[str, Any] = dict(getattr(data, "facts", {}))
        self.files: Mapping[str, bytes] = dict(getattr(data, "files", {}))
        own = str(getattr(data, "fingerprint", ""))
        self.fingerprint = hashlib.sha256(f"{identity}\n{own}".encode()).hexdigest()
        self._name = name
        self.last_batch: dict[str, int] | None = None
        """Step, size and checksum of the training batch that was read last. Checkpoints store it."""

    @classmethod
    def open(cls, config: CustomDataConfig, seed: int) -> UserDataset:
        """Runs the file of a configuration and creates the object.

        Raises:
            ConfigError, UsageError, DataError: The file has no such class, or creating the object fails.
        """
        kind = custom.data_class(config.kind)
        try:
            data = kind(config, seed)
        except IceNetError:
            raise
        except Exception as error:
            raise _failed(config.kind, "cannot be created", error) from error
        files = user_code.hashes(kind.__module__)
        options = config.model_dump(mode="json", exclude={"kind"})
        return cls(data, config.kind, json.dumps([files, options, seed], sort_keys=True, default=str))

    def check(self, batch_size: int) -> None:
        """Checks the first batch: its arrays, and that a step has the same batch each time.

        Raises:
            DataError: It is something else.
        """
        first, again = self.train_batch(0, batch_size), self.train_batch(0, batch_size)
        for name, array in first.items():
            if name not in again or not np.array_equal(array, again[name], equal_nan=array.dtype.kind == "f"):
                raise DataError(
                    f"data.kind {self._name}: two calls of train_batch(0, {batch_size}) have different {name}; a "
                    "batch must depend on seed and step only, as numpy.random.default_rng([seed, step]) does"
                )

    def steps_per_epoch(self, batch_size: int) -> int:
        """Returns the number of batches in one pass; 1 for data that does not say it."""
        own = getattr(self.data, "steps_per_epoch", None)
        return int(own(batch_size)) if own is not None else 1

    def train_batch(self, step: int, batch_size: int) -> Batch:
        """Returns the batch of a step, counted from 0.

        Raises:
            DataError: The object's method fails, or returns something else than a batch.
        """
        batch = self._checked(
            self._call("train_batch", step, batch_size), f"train_batch({step}, {batch_size})", batch_size
        )
        self.last_batch = {"step": step, "batch_size": batch_size, "checksum": _checksum(batch)}
        return batch

    def changed_batch(self, earlier: Any) -> list[str]:
        """Returns a note if a step has another batch than it had in an earlier process.

        Args:
            earlier: `last_batch` of that process. Anything else has no note.
        """
        if not isinstance(earlier, Mapping) or not all(type(earlier.get(key)) is int for key in _LAST_BATCH):
            return []
        self.train_batch(earlier["step"], earlier["batch_size"])
        if self.last_batch == earlier:
            return []
        return [
            f"the batch of step {earlier['step'] + 1} is not the one that the checkpoint was trained with: "
            f"{self.description} reads other data than before, or its train_batch depends on more than seed and step"
        ]

    def validation_batches(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """Yields at most `count` validation batches; none for data without the method."""
        if not hasattr(self.data, "validation_batches"):
            return
        batches = iter(self._call("validation_batches", batch_size, count))
        index = 0
        while count is None or index < count:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                raise _failed(self._name, f"validation_batches({batch_size}, {count})", error) from error
            yield self._checked(batch, f"batch {index} of validation_batches", None)
            index += 1

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self.data, method)(*arguments)
        except IceNetError:
            raise
        except Exception as error:
            raise _failed(self._name, f"{method}{arguments}", error) from error

    def _checked(self, batch: Any, where: str, rows: int | None) -> Batch:
        """Returns a batch with int32 for integers and float32 for other numbers."""

        def wrong(what: str) -> DataError:
            return DataError(f"data.kind {self._name}: {where} {what}")

        if not isinstance(batch, Mapping):
            raise wrong(f"is a {type(batch).__name__}; return a dict of numpy arrays")
        if missing := [name for name in REQUIRED if name not in batch]:
            hint = " (for a loss without labels, give floats such as the inputs)" if missing == ["labels"] else ""
            raise wrong(f"has no {' and no '.join(missing)}; both are required{hint}")
        checked: Batch = {}
        for name, value in batch.items():
            if not isinstance(value, np.ndarray) or value.ndim == 0:
                raise wrong(
                    f"has {name} of type {type(value).__name__}; return a numpy array with a row for each example"
                )
            checked[str(name)] = _narrow(value, lambda problem, name=name: wrong(f"has {name} {problem}"))
        lengths = {name: len(array) for name, array in checked.items()}
        expected = rows if rows is not None else lengths["inputs"]
        if set(lengths.values()) != {expected} or not expected:
            given = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise wrong(f"has these numbers of rows: {given}; each array needs {expected or 'some'}")
        return checked


def _checksum(batch: Batch) -> int:
    """Returns a checksum of the names, the shapes and the beginnings of the arrays of a batch."""
    found = 0
    for name, array in sorted(batch.items()):
        found = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), found)
        found = zlib.crc32(array.reshape(-1)[: _CHECKED_BYTES // array.itemsize].tobytes(), found)
    return found


def _narrow(array: NDArray[Any], wrong: Any) -> NDArray[Any]:
    kind = array.dtype.kind
    if kind == "b":
        return np.ascontiguousarray(array)
    if kind in "iu":
        if array.size and (array.min() < -(2**31) or array.max() >= 2**31):
            raise wrong("beyond int32")
        return np.ascontiguousarray(array, np.int32)
    if kind == "f":
        return np.ascontiguousarray(array, np.float32)
    raise wrong(f"of dtype {array.dtype}; use integers, floats or booleans")


def _failed(name: str, what: str, error: Exception) -> DataError:
    reason = first_line(error, "")
    where = user_code.location(error)
    return DataError(f"data.kind {name}: {what}: {type(error).__name__}: {reason}{f' ({where})' if where else ''}")
