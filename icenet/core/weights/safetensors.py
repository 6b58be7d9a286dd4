"""One safetensors file: its dtypes, and its header read with every claim checked against the file.

The format is small (8 bytes of length, a JSON header, the arrays) and is read here rather than by the
safetensors package, whose numpy side refuses bfloat16. The tests hold the two against each other.

numpy has no bfloat16, and a bare uint16 would forget what it holds. Such arrays have the dtype `BFLOAT16`: a
record of one field named bfloat16. It keeps every bit, survives indexing and transposing, refuses arithmetic,
and is `array.view(numpy.uint16)` to a framework. Arrays of ml_dtypes' bfloat16 are accepted for writing.

Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core.errors import WeightsError

Array = npt.NDArray[Any]

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package

BFLOAT16 = np.dtype([("bfloat16", "<u2")], align=True)

# In the order of the safetensors package, which puts the arrays of later types first: wide types before
# narrow ones, so that every array is aligned.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "C64": np.dtype("<c8"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
RANK = {name: rank for rank, name in enumerate(DTYPES)}


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The safetensors name of a dtype: "F32", "BF16". Raises WeightsError where there is none."""
    if dtype.name == "bfloat16":  # ml_dtypes, known by name so that it need not be installed
        return "BF16"
    little = dtype.newbyteorder("<") if dtype.names is None else dtype
    for name, known in DTYPES.items():
        if little == known:
            return name
    raise WeightsError(f"numpy dtype {dtype} cannot be stored in safetensors; cast it to one of {', '.join(DTYPES)}")


def bfloat16_to_float32(array: Array) -> Array:
    """The float32 array of the same shape and values (exact: bfloat16 is float32's upper half)."""
    return np.asarray(np.left_shift(array.view(np.uint16), 16, dtype=np.uint32)).view(np.float32)


@dataclass(frozen=True)
class Entry:
    """Where one array lies: bytes start to stop of a file, its safetensors dtype and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def damaged(path: Path, what: str) -> WeightsError:
    return WeightsError(f"{path}: {what}; it is damaged or not a safetensors file: copy or save it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def parse_json(text: bytes | bytearray) -> Any:
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def open_file(path: Path) -> tuple[dict[str, str], dict[str, Entry], mmap.mmap]:
    """Metadata, entries and memory map of one file, all checked against the file's size."""
    try:
        if not path.is_file():
            raise WeightsError(f"{path}: no such file; check the path, or copy the missing file beside the others")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise damaged(path, f"it has {size} bytes, too few for a header")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be read ({error.strerror}); check its permissions and the disk"
        ) from error
    if data[:8] == b"version ":
        raise WeightsError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` where it came from")
    length = int.from_bytes(data[:8], "little")
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise damaged(path, f"its header claims {length} bytes of a file of {size}")
    try:
        header = parse_json(data[8 : 8 + length])
    except ValueError as error:
        raise damaged(path, f"its header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise damaged(path, "its header is not a table of arrays")
    metadata = header.pop("__metadata__", None) or {}  # mlx.core.save_safetensors writes null for none
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "its metadata are not text")
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise damaged(path, f"the data of {name!r} overlap others or leave a gap")
        end = entry.stop
    if end > size:
        raise damaged(path, f"it is cut short, at {size} of {end} bytes")
    if end < size:
        raise damaged(path, f"it has {size - end} bytes that belong to no array")
    return metadata, entries, data


def _entry(path: Path, name: str, value: Any, base: int) -> Entry:
    def whole(numbers: Any) -> bool:
        return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)

    if not name:
        raise damaged(path, "an array has no name")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"the entry of {name!r} is not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WeightsError(
            f"{path}: {name!r} has dtype {dtype!r}, which IceNet does not read; save it as one of {', '.join(DTYPES)}"
        )
    if not whole(shape) or not whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"the shape or the offsets of {name!r} are not whole numbers in order")
    itemsize = DTYPES[dtype].itemsize
    # numpy bounds what the non-empty axes of even an empty array may span, and (before 2.0) their number
    if len(shape) > 32 or math.prod(n for n in shape if n) * itemsize >= 2**63:
        raise damaged(path, f"the shape of {name!r} is impossible")
    if math.prod(shape) * itemsize != offsets[1] - offsets[0]:
        raise damaged(
            path, f"{name!r} of shape {shape} and dtype {dtype} cannot have {offsets[1] - offsets[0]} bytes"
        )
    return Entry(path, dtype, tuple(shape), base + offsets[0], base + offsets[1])
