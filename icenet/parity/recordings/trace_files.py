"""The files of a recorded trace: `arrays.bin` grows while a module is recorded, `manifest.json` is written last.

The manifest has everything but the numbers, and the place, dtype and shape of each array. Nothing is pickled, and no
file names another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

from icenet.core.errors import DataError, FileError, UsageError
from icenet.core.files import write_error, write_text
from icenet.parity.calls.events import Store
from icenet.parity.calls.structures import Slot
from icenet.parity.trace import Value

Array = npt.NDArray[Any]

FORMAT = 1
EVALUATION, TRAINING = "evaluation", "training"
"""The modes of the runs in a trace."""
ARRAYS, MANIFEST = "arrays.bin", "manifest.json"
_ALIGNMENT = 64
_MANIFEST_LIMIT = 256 << 20
_DTYPES = ("<f2", "<f4", "<f8", "<c8", "<c16", "|b1", "|i1", "|u1", *(f"<{k}{n}" for k in "iu" for n in (2, 4, 8)))


class StoredValue(Value):
    """A value whose array is read from a file whenever it is used.

    Attributes:
        index: Its number in the trace; -1 for a value in memory.
    """

    def __init__(
        self, array: Array | None = None, dtype: str = "", *, read: Callable[[], Array] | None = None, index: int = -1
    ) -> None:
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "_read", (lambda: array) if read is None else read)

    index: int

    @property
    def array(self) -> Array:  # type: ignore[override]
        """The array."""
        found: Array = self._read()  # type: ignore[attr-defined]
        return found


class TraceWriter:
    """Writes the arrays of a trace as they come. Equal ones are written once.

    Args:
        folder: A new or empty folder, or one with a trace, which is replaced.

    Raises:
        UsageError: The folder holds something else.
        FileError: It cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._is_new = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            others = sorted({item.name for item in self.folder.iterdir()} - {ARRAYS, MANIFEST})
            if others:
                raise UsageError(f"{self.folder}: holds other files ({others[0]}); name a new folder for the trace")
            (self.folder / MANIFEST).unlink(missing_ok=True)  # first: the trace is not complete meanwhile
            self._file: BinaryIO = (self.folder / ARRAYS).open("w+b")
        except OSError as error:
            raise FileError(f"{self.folder}: {write_error(self.folder, error)}") from error
        self._places: list[tuple[int, str, tuple[int, ...]]] = []
        self._known: dict[bytes, int] = {}
        self._end = 0

    def add(self, array: Array) -> int:
        """Writes an array and returns its number."""
        array = np.asarray(array)
        if array.dtype == ml_dtypes.bfloat16:
            array = array.astype(np.float32)
        array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
        if array.dtype.str not in _DTYPES:
            raise UsageError(f"record: arrays of dtype {array.dtype} cannot be written")
        data = array.tobytes()
        key = hashlib.blake2b(data, digest_size=20, person=f"{array.dtype.str}{array.ndim}".encode()).digest()
        key += repr(array.shape).encode()
        if key not in self._known:
            with self._writing():
                self._file.seek(self._end)
                self._file.write(data)
            self._known[key] = len(self._places)
            self._places.append((self._end, array.dtype.str, array.shape))
            self._end += -(-len(data) // _ALIGNMENT) * _ALIGNMENT
        return self._known[key]

    def keep(self, value: Value) -> StoredValue:
        """Writes a value, and returns it without its array, which is read again when it is used."""
        if isinstance(value, StoredValue) and value.index >= 0:
            return value
        index = self.add(value.array)
        offset, dtype, shape = self._places[index]

        def read() -> Array:
            with self._writing():
                self._file.flush()
            count = math.prod(shape)
            data = os.pread(self._file.fileno(), count * np.dtype(dtype).itemsize, offset)
            return np.frombuffer(data, dtype).reshape(shape)

        return StoredValue(dtype=value.dtype, read=read, index=index)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Writes the manifest, which makes the trace complete."""
        with self._writing():
            self._file.truncate(self._end)
            self._file.flush()
            os.fsync(self._file.fileno())
        manifest = {"icenet_trace": FORMAT, **manifest, "arrays": self._places, "bytes": self._end}
        write_text(self.folder / MANIFEST, json.dumps(manifest) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def discard(self) -> None:
        """Deletes what was written, after an error or an interrupt."""
        with contextlib.suppress(OSError):  # the rest may not fit on the disk
            self._file.close()
        with contextlib.suppress(OSError):
            (self.folder / ARRAYS).unlink(missing_ok=True)
            (self.folder / MANIFEST).unlink(missing_ok=True)
            if self._is_new:
                self.folder.rmdir()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the errors of a disk into a FileError."""
        try:
            yield
        except OSError as error:
            path = self.folder / ARRAYS
            reason = f"{path}: {write_error(path, error)}"
            raise FileError(f"{reason}; the recording is deleted, because it is incomplete") from error


class TraceStore(Store):
    """Keeps the arrays of a run in the files of a trace."""

    def __init__(self, writer: TraceWriter) -> None:
        super().__init__()
        self._writer = writer

    def keep(self, value: Value) -> Value:
        """Writes a value to the trace."""
        return self._writer.keep(value)


class TraceReader:
    """Reads the files of a trace.

    Args:
        folder: The folder.

    Attributes:
        manifest: The manifest.

    Raises:
        DataError: It is no trace, or one that is incomplete or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.manifest = self._read_manifest()
        with _damaged(self.folder):
            size = _whole(self.manifest["bytes"])
            self._places = [(_whole(o), str(d), tuple(map(_whole, s))) for o, d, s in self.manifest["arrays"]]
            for _, dtype, shape in self._places:
                if dtype not in _DTYPES or len(shape) > 32:
                    raise ValueError
        path = self.folder / ARRAYS
        try:
            if path.is_symlink() or not path.is_file() or path.stat().st_size != size:
                raise DataError(f"{self.folder}: {ARRAYS} is missing or incomplete; record the trace again")
            with path.open("rb") as file:
                self._data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: there is no such folder; icenet parity record writes one")
        if not path.is_file() or path.is_symlink():
            what = "an unfinished trace; record it again" if (self.folder / ARRAYS).exists() else "not a trace"
            raise DataError(f"{self.folder}: {what} ({MANIFEST} is missing)")
        try:
            if path.stat().st_size > _MANIFEST_LIMIT:
                raise DataError(f"{path}: is larger than {_MANIFEST_LIMIT >> 20} MB; this is no trace")
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError):
            raise damaged(self.folder) from None
        if not isinstance(manifest, dict) or manifest.get("icenet_trace") != FORMAT:
            raise DataError(f"{path}: is not a trace of format {FORMAT}; record it with this version of IceNet")
        return manifest

    def array(self, index: Any) -> Array:
        """Returns the array with a number, a view of the file. A place outside the file raises ValueError."""
        offset, dtype, shape = self._places[_whole(index)]
        return np.frombuffer(self._data, dtype, math.prod(shape), offset).reshape(shape)

    def value(self, index: Any, dtype: Any) -> Value:
        """Returns the value with a number and the dtype that it had in the framework."""
        return Value(self.array(index), str(dtype))


def damaged(folder: Path) -> DataError:
    """Returns the error on a trace that cannot be understood."""
    return DataError(f"{folder}: the trace is damaged; record it again")


class _damaged:
    """Turns the errors of a manifest with other contents into a DataError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        expected = (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, OverflowError)
        if isinstance(error, expected):
            raise damaged(self._folder) from None


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError
    return number


# ---- structures in JSON -------------------------------------------------------------------------------------


def encode(item: Any, what: str) -> Any:
    """Returns nested tuples, lists and dicts of slots and constants in JSON types.

    Raises:
        UsageError: There is something else in it.
    """
    if isinstance(item, Slot):
        return {"slot": item.index}
    if type(item) in (tuple, list):
        return {type(item).__name__: [encode(part, what) for part in item]}
    if type(item) is dict:
        return {"dict": [[encode(key, what), encode(part, what)] for key, part in item.items()]}
    if item is None or type(item) in (bool, int, str) or (type(item) is float and math.isfinite(item)):
        return {"is": item}
    raise UsageError(
        f"record: {what} holds a {type(item).__name__}, which cannot be written; pass arrays and numbers"
    )


def decode(item: Any) -> Any:
    """Returns what `encode` was given."""
    ((kind, content),) = item.items()
    if kind == "slot":
        return Slot(_whole(content))
    if kind in ("tuple", "list"):
        parts = [decode(part) for part in content]
        return tuple(parts) if kind == "tuple" else parts
    if kind == "dict":
        return {decode(key): decode(part) for key, part in content}
    if kind != "is" or isinstance(content, (dict, list)):
        raise ValueError
    return content
