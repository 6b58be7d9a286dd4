"""One safetensors file: reads its table of arrays and maps its data. `safetensors_writer` writes one.

The safetensors package parses and validates headers. Arrays are views of a memory map here; the package copies each
array that it reads.

Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from icenet.core.errors import WeightsError
from icenet.core.host.threads import for_ranges
from icenet.core.weights import formats
from icenet.core.weights.copying import MOST_THREADS, PART

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
    found = {id(data): data for data in map(map_of, arrays) if data is not None}
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
    data = map_of(array)
    are_contiguous = array.flags.c_contiguous and target.flags.c_contiguous
    if data is None or not are_contiguous or array.dtype != target.dtype or not hasattr(os, "preadv"):
        return False
    file, start, content = data.file.fileno(), offset(array, data), target.reshape(-1).view(np.uint8).data

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
    data = map_of(array)
    if data is not None and array.size:
        steps = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
        start = offset(array, data) + sum(step for step in steps if step < 0)
        stop = start + sum(map(abs, steps)) + array.itemsize
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        data.madvise(advice, page, stop - page)


def map_of(array: Array) -> FileMap | None:
    """Returns the memory map of a file that an array is a view of. That of a user may have changes in memory only."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    data = base.obj if isinstance(base, memoryview) else base
    return data if isinstance(data, FileMap) else None


def offset(array: Array, data: mmap.mmap) -> int:
    """Returns the byte of the memory map `data` at which an array of `view` begins."""
    return array.ctypes.data - np.frombuffer(data, np.uint8, 1).ctypes.data
