"""Arrays in temporary files: what a comparison holds above the limit of its memory.

The files have no names: the system deletes them when their arrays are no longer used, and at the end of the process,
also after a signal or a crash. A file has room for several arrays, because each mapped file needs a descriptor.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import tempfile
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FILE_SIZE = 64 << 20
"""Bytes of a file, unless a larger array is in it. What no array has filled takes no space."""
_ALIGNMENT = 64


class ArrayFiles:
    """Writes arrays to temporary files, those with equal contents once."""

    def __init__(self) -> None:
        self._file: Any = None
        self._map: Any = None
        self._end = self._size = 0
        self._known: weakref.WeakValueDictionary[bytes, Array] = weakref.WeakValueDictionary()

    def write(self, array: Array) -> Array:
        """Returns an array with the same contents and order of axes in memory, which is read from a file.

        Raises:
            OSError: The file cannot be written.
        """
        is_fortran = array.flags.fnc
        data = np.ascontiguousarray(array.T if is_fortran else array).reshape(-1).view(np.uint8).data
        shape = array.shape[::-1] if is_fortran else array.shape
        kind = f"{array.dtype.str} {array.shape} {is_fortran}".encode()
        key = hashlib.blake2b(data, digest_size=20).digest() + kind
        known = self._known.get(key)
        if known is not None:
            return known
        offset = self._append(data)
        found = np.frombuffer(self._map, array.dtype, math.prod(shape), offset).reshape(shape)
        self._known[key] = found = found.T if is_fortran else found
        return found

    def close(self) -> None:
        """Forgets the arrays. A file is deleted with the last of its arrays."""
        if self._file is not None:
            self._file.close()
        self._file = self._map = None
        self._end = self._size = 0
        self._known.clear()

    def _append(self, data: memoryview) -> int:
        """Writes bytes to the file, or to a new one if they do not fit; returns their place."""
        if self._file is None or self._end + data.nbytes > self._size:
            if self._file is not None:
                self._file.close()  # its arrays keep the map
            self._file = tempfile.TemporaryFile(prefix="icenet-parity-", buffering=0)  # noqa: SIM115
            self._end, self._size = 0, max(FILE_SIZE, data.nbytes)
            self._file.truncate(self._size)
            self._map = mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_READ)
        offset = self._end
        self._file.seek(offset)
        rest = data
        while rest.nbytes:  # without a buffer, a call may write a part
            rest = rest[self._file.write(rest) :]
        self._end += -(-data.nbytes // _ALIGNMENT) * _ALIGNMENT
        return offset
