"""Writes one safetensors file.

The safetensors package writes metadata in random order, so the same weights would give different bytes, and
converting a file twice would not be idempotent. It also reports a full disk as text without `errno`. The header is 8
bytes of length and one line of JSON.

Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from icenet.core.files import reserve
from icenet.core.weights.copying import PART, contiguous, copy_to
from icenet.core.weights.safetensors import DTYPES, FileMap, Spec, dtype_name, map_of, offset, read_ahead, release

Array = npt.NDArray[Any]
_RANK = {name: rank for rank, name in enumerate(DTYPES)}


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
        data = map_of(array)
        is_stored = array.flags.c_contiguous and array.dtype == array.dtype.newbyteorder("<") and array.nbytes > 0
        if data is None or not is_stored or not hasattr(os, "preadv"):
            return False
        start = offset(array, data)
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
    data = None if first is None else map_of(first)
    if first is None or data is None or first.nbytes < mmap.PAGESIZE:
        return -start % 8
    padding = (offset(first, data) - start) % mmap.PAGESIZE
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
