"""One safetensors file: reads its table of arrays, maps its data, writes it.

The safetensors package parses and validates headers. Two parts are implemented here:

- Arrays are views of a memory map. The package copies each array that it reads.
- The writer. The package writes metadata in random order, so the same weights would give different bytes, and
  converting a file twice would not be idempotent. It also reports a full disk as text without `errno`. The header
  is 8 bytes of length and one line of JSON.

Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import mmap
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from icenet.core.errors import WeightsError
from icenet.core.files import reserve
from icenet.core.threads import for_ranges
from icenet.core.weights import formats
from icenet.core.weights.copying import MOST_THREADS, PART, contiguous, copy_to

Array = npt.NDArray[Any]

# In the order of the safetensors package, which writes the arrays of later dtypes first: wide dtypes before narrow
# ones, so that every array is aligned.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "C64": np.dtype("<c8"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}


class Spec(NamedTuple):
    """The dtype and the shape of an array."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def spec_of(weights: Mapping[str, Array], name: str) -> Spec:
    """Returns the dtype and the shape of an array.

    A mapping whose arrays are computed on access, such as dequantized ones, has a method `spec(name)` for it.
    """
    spec = getattr(weights, "spec", None)
    if spec is not None:
        found: Spec = spec(name)
        return found
    array = weights[name]
    return Spec(array.dtype, tuple(array.shape))


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Returns the safetensors name of a dtype, such as "F32" or "BF16".

    Raises:
        WeightsError: The safetensors format has no such dtype.
    """
    little_endian = dtype.newbyteorder("<")
    for name, known in DTYPES.items():
        if little_endian == known:
            return name
    raise WeightsError(f"numpy dtype {dtype} cannot be stored in safetensors; cast it to one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Entry:
    """The location of one array: bytes `start` to `stop` of `file`, with its safetensors dtype and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class FileMap(mmap.mmap):
    """A read-only memory map that keeps its file open, so that its arrays can be copied from file to file."""

    file: BinaryIO
    path: Path

    @classmethod
    def of(cls, file: BinaryIO) -> FileMap:
        """Returns the map of an open file."""
        found = cls(file.fileno(), 0, access=mmap.ACCESS_READ)
        found.file = os.fdopen(os.dup(file.fileno()), "rb", buffering=0)
        found.path = Path(file.name)
        return found

    def check(self) -> None:
        """Raises WeightsError if the file has become shorter: reading the map would end the process."""
        if os.fstat(self.file.fileno()).st_size < len(self):
            raise self.shorter()

    def shorter(self) -> WeightsError:
        """Returns the error of a file that has become shorter."""
        return WeightsError(f"{self.path}: became shorter while it was read; copy or download it again")


def file_maps(arrays: Iterable[Array]) -> list[FileMap]:
    """Returns the memory maps of files that arrays are views of."""
    found = {id(data): data for data in map(_map_of, arrays) if data is not None}
    return list(found.values())


def open_file(path: Path) -> tuple[dict[str, str], dict[str, Entry], FileMap]:
    """Returns the metadata, the entries and a read-only memory map of a file. No array is read.

    Raises:
        WeightsError: The file cannot be read, or its header does not describe the whole file.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file", "check the path, or copy the missing file next to the others")
    try:
        with path.open("rb") as file:
            with safe_open(path, framework="np") as header:
                length = _header_length(file)
                # the package keeps the last of several arrays of one name
                json.loads(file.read(length), object_pairs_hook=without_duplicates)
                metadata = header.metadata() or {}
                entries = _entries(path, header, 8 + length)
            data = FileMap.of(file)
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be read ({error.strerror or error})", "check its permissions and the disk"
        ) from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error).removeprefix("Error while deserializing header: ")) from None
    if max((entry.stop for entry in entries.values()), default=0) > len(data):
        raise _damaged(path, "it changed while it was opened")
    return metadata, entries, data


def _header_length(file: BinaryIO) -> int:
    """Returns the length of the header in bytes; the header comes next in the file."""
    file.seek(0)
    return int.from_bytes(file.read(8), "little")


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the dict of a JSON object, for `object_pairs_hook`. Raises ValueError if it repeats a name."""
    table = dict(pairs)
    if len(table) != len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"duplicate name {next(name for name, count in names.items() if count > 1)!r}")
    return table


def _entries(path: Path, header: Any, start: int) -> dict[str, Entry]:
    """Returns the entries of an open file whose data begin at byte `start`.

    The package has checked that the arrays fill the rest of the file without gaps or overlaps, so offsets are sums of
    sizes.
    """
    entries = {}
    for name in header.offset_keys():
        array = header.get_slice(name)
        dtype, shape = array.get_dtype(), tuple(array.get_shape())
        if not name:
            raise _damaged(path, "an array has no name")
        if dtype not in DTYPES:
            raise WeightsError(
                f"{path}: {name!r} has dtype {dtype}, which IceNet does not support",
                f"save it as one of {', '.join(DTYPES)}",
            )
        itemsize = DTYPES[dtype].itemsize
        # numpy limits the product of the non-empty axes even of an empty array and (before 2.0) their number
        if len(shape) > 32 or math.prod(size for size in shape if size) * itemsize >= 2**63:
            raise _damaged(path, f"the shape of {name!r} is impossible")
        stop = start + math.prod(shape) * itemsize
        entries[name] = Entry(path, dtype, shape, start, stop)
        start = stop
    return entries


def _damaged(path: Path, reason: str) -> WeightsError:
    # the reason can contain names from the file: keep it to one short line
    line = "".join(character if character.isprintable() else "?" for character in reason)
    line = line if len(line) <= 200 else line[:200] + "..."
    if explanation := formats.explain(path):
        return WeightsError(f"{path}: {explanation[0]}", explanation[1])
    return WeightsError(f"{path}: damaged or not a safetensors file ({line})", "copy or save it again")


def view(entry: Entry, data: mmap.mmap) -> Array:
    """Returns the array of an entry as a read-only view of the memory map `data` of its file.

    Copies it only if the file does not align it, because the frameworks may refuse such a view.
    """
    dtype, count = DTYPES[entry.dtype], math.prod(entry.shape)
    if count == 0:
        return np.empty(entry.shape, dtype)
    if isinstance(data, FileMap):
        data.check()
    flat = np.frombuffer(data, dtype, count, entry.start)
    return (flat if flat.flags.aligned else flat.copy()).reshape(entry.shape)


def read_ahead(array: Array) -> None:
    """Reads an array of `view` into memory at once, which on Linux takes a third of the time of reading its pages."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # Linux before 5.14; a damaged disk, which the reader of the array meets
            _advise(array, _MADV_POPULATE_READ)


def read_into(target: Array, array: Array) -> bool:
    """Reads an array of `view` from its file into memory of the same dtype and shape, in several threads.

    Returns whether that is possible. The system then copies once, and maps no pages of the file.
    """
    data = _map_of(array)
    are_contiguous = array.flags.c_contiguous and target.flags.c_contiguous
    if data is None or not are_contiguous or array.dtype != target.dtype or not hasattr(os, "preadv"):
        return False
    file, start, content = data.file.fileno(), _offset(array, data), target.reshape(-1).view(np.uint8).data

    def read(first: int, stop: int) -> None:
        while first < stop:
            count = os.preadv(file, [content[first:stop]], start + first)
            if count == 0:
                raise data.shorter()
            first += count

    for_ranges(read, target.nbytes, PART, MOST_THREADS)
    return True


def release(array: Array) -> None:
    """Lets the system reclaim the memory of an array of `view`. The array stays valid: it is read again when used."""
    if hasattr(mmap, "MADV_DONTNEED"):  # which Windows lacks
        _advise(array, mmap.MADV_DONTNEED)


_MADV_POPULATE_READ = 22


def _advise(array: Array, advice: int) -> None:
    """Says how the memory of an array of `view` is used; does nothing for other arrays."""
    data = _map_of(array)
    if data is not None and array.size:
        steps = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
        start = _offset(array, data) + sum(step for step in steps if step < 0)
        stop = start + sum(map(abs, steps)) + array.itemsize
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        data.madvise(advice, page, stop - page)


def _map_of(array: Array) -> FileMap | None:
    """Returns the memory map of a file that an array is a view of. That of a user may have changes in memory only."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    data = base.obj if isinstance(base, memoryview) else base
    return data if isinstance(data, FileMap) else None


def _offset(array: Array, data: mmap.mmap) -> int:
    return array.ctypes.data - np.frombuffer(data, np.uint8, 1).ctypes.data


class _Copy:
    """Copies arrays of memory maps from file to file, without mapping them; adjacent ones together.

    Args:
        file: The file to write, at its end.
        threads: Copies the second half while this thread copies the first.
    """

    def __init__(self, file: BinaryIO, threads: ThreadPoolExecutor) -> None:
        self._file = file
        self._threads = threads
        self._source: FileMap | None = None
        self._start = self._stop = 0

    def add(self, array: Array) -> bool:
        """Copies an array now or later. Returns whether that is possible."""
        data = _map_of(array)
        is_stored = array.flags.c_contiguous and array.dtype == array.dtype.newbyteorder("<") and array.nbytes > 0
        if data is None or not is_stored or not hasattr(os, "preadv"):
            return False
        start = _offset(array, data)
        if data is not self._source or start != self._stop:
            self.finish()
            self._source, self._start = data, start
        self._stop = start + array.nbytes
        if (length := self._stop - self._start) >= _MOST_PENDING:
            self._copy(length - (self._file.tell() + length) % _COPIED)  # the rest begins at a page
        return True

    def finish(self) -> None:
        """Copies what is left."""
        self._copy(self._stop - self._start)
        self._source, self._start, self._stop = None, 0, 0

    def _copy(self, count: int) -> None:
        if self._source is None or count <= 0:
            return
        self._file.flush()
        source, target, start, at = self._source, self._file.fileno(), self._start, self._file.tell()

        def copy(first: int, stop: int) -> None:
            # the system copies pages, or shares them on some file systems; pages of the two files may be shifted
            is_aligned = (start - at) % mmap.PAGESIZE == 0 and hasattr(os, "copy_file_range")
            if not (is_aligned and _copy_range(source, start + first, target, at + first, stop - first)):
                _copy_through_memory(source, start + first, target, at + first, stop - first)

        # Linux writes to a file for one thread at a time; the other one reads meanwhile
        middle = count // 2 if count >= 2 * PART else count
        second = self._threads.submit(copy, middle, count) if middle < count else None
        copy(0, middle)
        if second is not None:
            second.result()
        self._start += count
        self._file.seek(at + count)


def _copy_range(source: FileMap, start: int, target: int, at: int, count: int) -> bool:
    """Copies bytes from file to file by the system. Returns whether the file systems support it."""
    left = count
    while left:
        try:
            copied = os.copy_file_range(source.file.fileno(), target, left, start, at)
        except OSError as error:
            if error.errno in _CANNOT_COPY and left == count:
                return False
            raise
        if copied == 0:
            raise source.shorter()
        start, at, left = start + copied, at + copied, left - copied
    return True


def _copy_through_memory(source: FileMap, start: int, target: int, at: int, count: int) -> None:
    """Copies bytes from file to file through memory that stays in the cache of a core."""
    memory = memoryview(bytearray(_COPIED))
    while count:
        part = memory[: min(_COPIED - at % _COPIED, count)]  # whole pages of the target
        read = os.preadv(source.file.fileno(), [part], start)
        if read == 0:
            raise source.shorter()
        written = os.pwrite(target, part[:read], at)
        start, at, count = start + written, at + written, count - written


def _write(file: BinaryIO, array: Array) -> None:
    """Writes an array, C-contiguous and little-endian.

    An array that has another order in memory is copied a part at a time: a copy of all of it would take new pages.
    """
    dtype = array.dtype.newbyteorder("<")
    if array.ndim < 2 or array.nbytes == 0 or (array.flags.c_contiguous and array.dtype == dtype):
        _write_bytes(file, contiguous(array).astype(dtype, copy=False))
        return
    read_ahead(array)
    rows = max(_PERMUTED // array[0].nbytes, _LEAST_ROWS)
    memory = np.empty((min(rows, len(array)), *array.shape[1:]), dtype)
    for first in range(0, len(array), rows):
        part = array[first : first + rows]
        copy_to(memory[: len(part)], part)
        _write_bytes(file, memory[: len(part)])
    release(array)


def _write_bytes(file: BinaryIO, array: Array) -> None:
    """Writes a C-contiguous array in pieces: Linux looks for large blocks of free memory for large pieces."""
    content = array.reshape(-1).view(np.uint8)
    for first in range(0, content.nbytes, _WRITTEN):
        file.write(content[first : first + _WRITTEN].data)


_COPIED, _WRITTEN, _MOST_PENDING = 1 << 16, 1 << 18, 1 << 26
"""Bytes that are copied through memory at a time, those that are written at a time, and those of adjacent arrays
that are copied together."""
_PERMUTED, _LEAST_ROWS = 1 << 22, 64
"""Bytes of a part of an array that has another order in memory, and the smallest number of rows: those of one cache
line. Smaller parts take more calls of numpy, which are a third of the time with parts of 1 MB."""
_CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ETXTBSY}
"""Errors of `copy_file_range` for files or file systems that it does not support."""


def _padding(length: int, first: Array | None) -> int:
    """Returns the number of spaces after a header of some bytes, a multiple of 8 with them.

    If the first array is copied from a file, the data begin at the same byte of a page as there. The arrays of a file
    of the safetensors package have the same order, so the system copies whole pages: in half the processor time.
    """
    start = 8 + length
    data = None if first is None else _map_of(first)
    if first is None or data is None or first.nbytes < mmap.PAGESIZE:
        return -start % 8
    padding = (_offset(first, data) - start) % mmap.PAGESIZE
    return padding if (start + padding) % 8 == 0 else -start % 8


def write_file(
    file: BinaryIO,
    arrays: Mapping[str, Array],
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str],
    written: Callable[[int], None],
) -> None:
    """Writes arrays to an open file, C-contiguous and little-endian.

    The bytes are those of the safetensors package, except that the metadata are sorted, and that the header of what
    is copied from a file may end in more spaces.

    Args:
        file: The file.
        arrays: The arrays, which are looked up one at a time.
        specs: The dtype and the shape of each array to write.
        metadata: Text to store in the header.
        written: Called with the number of bytes after each array. What is copied from a file may follow at once.
    """
    dtypes = {name: dtype_name(spec.dtype) for name, spec in specs.items()}
    names = sorted(specs, key=lambda name: (-_RANK[dtypes[name]], name))
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name in names:
        stop = start + specs[name].nbytes
        table[name] = {"dtype": dtypes[name], "shape": list(specs[name].shape), "data_offsets": [start, stop]}
        start = stop
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    first = arrays[names[0]] if names else None
    header += b" " * _padding(len(header), first)
    reserve(file, 8 + len(header) + start)
    file.write(len(header).to_bytes(8, "little") + header)
    with ThreadPoolExecutor(1) as threads:
        copy = _Copy(file, threads)
        for name in names:
            array, first = (arrays[name] if first is None else first), None
            if (array.dtype, array.shape) != specs[name]:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, not {specs[name]}")
            if not copy.add(array):
                copy.finish()
                _write(file, array)
            written(array.nbytes)
        copy.finish()
