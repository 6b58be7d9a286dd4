"""One GGUF file of llama.cpp: reads its metadata and its table of tensors, and dequantizes tensors on access.

The package gguf dequantizes. Its reader is not used: it makes several arrays per token of the vocabulary, which takes
seconds, and it trusts the counts and lengths of the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from icenet.core.errors import WeightsError
from icenet.core.weights.files import Array, StoredWeights
from icenet.core.weights.safetensors import FileMap, Spec

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
_MAX_TENSORS = 1 << 18
_MAX_KEYS = 1 << 16
_MAX_TEXTS = 1 << 21
"""Number of texts in the metadata: the tokens and merges of a vocabulary."""
_MAX_ARRAY_BYTES = 1 << 26
_CHUNK_VALUES = 1 << 20
_MAX_PARTS = 99999
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_SPLIT_COUNT, _SPLIT_NUMBER, _SPLIT_TENSORS = "split.count", "split.no", "split.tensors.count"

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _TEXT, _ARRAY = 6, 8, 9
_LENGTH = struct.Struct("<Q")

PLAIN = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}  # fmt: skip
"""Number of a type in the file: its name, the values in a block, and the bytes of a block."""


@dataclass(frozen=True)
class Entry:
    """The location of a tensor: bytes `start` to `stop` of the file, with its type and its shape in our order."""

    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the array: that of the file, and float32 for quantized values."""
        return PLAIN.get(self.kind, PLAIN["F32"])


class GgufFile(StoredWeights):
    """The tensors of a GGUF file by their names in the file.

    An array is made when it is looked up: a view of a memory map, or dequantized to float32.

    Attributes:
        path: The file.
        metadata: Its metadata: numbers, texts and lists of them. A float32 has the shortest value that rounds to it.
        entries: Name -> type, shape and location.

    Args:
        path: The file.

    Raises:
        WeightsError: It cannot be read, is damaged, or has tensors of a type that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = FileMap.of(file)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            reason = getattr(error, "strerror", None) or error
            raise WeightsError(f"{path}: cannot be read ({reason}); check the path and its permissions") from None
        try:
            header = _Header(self._data)
            self.metadata = header.metadata
            self.entries: Mapping[str, Entry] = header.entries
        except _Damaged as error:
            line = "".join(character if character.isprintable() else "?" for character in str(error))[:200]
            raise WeightsError(f"{path}: damaged or not a GGUF file ({line}); copy or download it again") from None

    def __getitem__(self, name: str) -> Array:
        entry = self.entries[name]
        self._data.check()
        if entry.kind in PLAIN:
            flat = np.frombuffer(self._data, entry.dtype, math.prod(entry.shape), entry.start)
            return (flat if flat.flags.aligned else flat.copy()).reshape(entry.shape)
        return _dequantized(entry, np.frombuffer(self._data, np.uint8, entry.stop - entry.start, entry.start))

    def spec(self, name: str) -> Spec:
        """Returns the dtype and the shape of an array."""
        return Spec(self.entries[name].dtype, self.entries[name].shape)

    def stored(self, name: str) -> memoryview:
        """Returns the bytes of a tensor."""
        return memoryview(self._data)[self.entries[name].start : self.entries[name].stop]


class SplitGguf(GgufFile):
    """The tensors of a GGUF file in several parts, such as `model-00001-of-00003.gguf`.

    Attributes:
        metadata: The metadata of the first part.

    Args:
        given: The part that was given.

    Raises:
        WeightsError: A part is missing, damaged or of another file.
    """

    def __init__(self, given: GgufFile) -> None:
        self.path = path = given.path
        count = given.metadata[_SPLIT_COUNT]
        match = _PART.fullmatch(path.name)
        if match is None or int(match[3]) != count:
            raise WeightsError(
                f"{path}: is one of {count} files; give them their names, NAME-00001-of-{count:05}{SUFFIX} and so on"
            )
        paths = [path.with_name(f"{match[1]}-{number + 1:05}-of-{match[3]}{SUFFIX}") for number in range(count)]
        if missing := [part.name for part in paths if not part.is_file()]:
            listed = ", ".join([*missing[:3], *(["..."] if len(missing) > 3 else [])])
            raise WeightsError(f"{path}: {len(missing)} of its {count} files are missing ({listed}); copy them here")
        parts = [given if part == path else GgufFile(part) for part in paths]
        entries: dict[str, Entry] = {}
        self._parts: dict[str, GgufFile] = {}
        for number, part in enumerate(parts):
            if (part.metadata.get(_SPLIT_COUNT), part.metadata.get(_SPLIT_NUMBER)) != (count, number):
                raise WeightsError(f"{part.path}: is not part {number + 1} of {count}; copy or download it again")
            if twice := next((name for name in part if name in entries), None):
                raise WeightsError(f"{part.path}: has {twice!r}, as another part has; copy or download them again")
            entries.update(part.entries)
            self._parts.update(dict.fromkeys(part, part))
        self.metadata, self.entries = parts[0].metadata, entries
        total = self.metadata.get(_SPLIT_TENSORS, len(entries))
        if total != len(entries):
            raise WeightsError(f"{path}: its {count} files have {len(entries)} tensors, not {total}; copy them again")

    def __getitem__(self, name: str) -> Array:
        return self._parts[name][name]

    def stored(self, name: str) -> memoryview:
        """Returns the bytes of a tensor."""
        return self._parts[name].stored(name)


def open_gguf(path: Path) -> GgufFile:
    """Returns the tensors of a file, or of all parts of the file that one belongs to.

    Raises:
        WeightsError: See `GgufFile` and `SplitGguf`.
    """
    file = GgufFile(path)
    count = file.metadata.get(_SPLIT_COUNT, 0)
    return SplitGguf(file) if isinstance(count, int) and 1 < count <= _MAX_PARTS else file


def is_gguf(path: Path) -> bool:
    """Returns whether a path is a GGUF file, by its first bytes."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def package(task: str) -> ModuleType:
    """Returns the module `gguf`.

    Args:
        task: What it is needed for, for the error message.

    Raises:
        WeightsError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        missing = f" ({error})" if not isinstance(error, ModuleNotFoundError) else ""
        raise WeightsError(f"{task} needs the package gguf{missing}: pip install 'icenet[gguf]'") from None
    return gguf


def _dequantized(entry: Entry, data: Array) -> Array:
    """Returns the values of a quantized tensor, some blocks at a time."""
    kind = getattr(package("a quantized GGUF file").quants, entry.kind)
    values, size = next((values, size) for name, values, size in TYPES.values() if name == entry.kind)
    blocks = data.reshape(-1, size)
    found = np.empty((len(blocks), values), np.float32)
    step = _CHUNK_VALUES // values
    # a scale may be infinite or NaN in a damaged file; the model's check of its logits says so
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            found[start : start + step] = kind.dequantize_blocks(blocks[start : start + step])
    return found.reshape(entry.shape)


class _Damaged(Exception):
    """What is wrong with a file."""


class _Header:
    """The metadata and the table of tensors of a file. All counts and lengths are checked against its size."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self._texts = 0
        if len(data) < 24 or data[:4] != MAGIC:
            raise _Damaged("it does not begin with GGUF, or is cut short")
        self._at = 4
        (version,) = self._numbers("I")
        if version not in VERSIONS:
            big = ", or big-endian" if version & 0xFFFF == 0 else ""
            raise _Damaged(f"version {version} is not supported{big}; only 2 and 3")
        tensors, keys = self._numbers("QQ")
        self._check_count("tensors", tensors, _MAX_TENSORS, 8 + 1 + 4 + 8 + 4 + 8)
        self._check_count("metadata", keys, _MAX_KEYS, 8 + 1 + 4 + 1)
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            name = self._text()
            if name in self.metadata:
                raise _Damaged(f"its metadata have {name!r} twice")
            (kind,) = self._numbers("I")
            self.metadata[name] = self._value(kind, name)
        self.entries = self._tensors(tensors)

    def _tensors(self, count: int) -> dict[str, Entry]:
        found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._text()
            if not name or name in found:
                raise _Damaged(f"its table has {name!r} twice" if name else "a tensor has no name")
            (axes,) = self._numbers("I")
            if axes > 4:
                raise _Damaged(f"{name!r} has {axes} axes; at most 4 are possible")
            shape = tuple(reversed(self._numbers("Q" * axes)))
            kind, offset = self._numbers("IQ")
            if kind not in TYPES:
                known = ", ".join(known for known, _, _ in TYPES.values())
                raise _Damaged(f"{name!r} has type {kind}, which is not supported; only {known}")
            text, values, size = TYPES[kind]
            if 0 in shape or math.prod(shape) >= 2**48 or (shape[-1] if shape else 1) % values:
                raise _Damaged(f"the shape {list(shape)} of {name!r} is impossible for {text}")
            found[name] = text, shape, offset, math.prod(shape) // values * size
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise _Damaged(f"general.alignment is {str(alignment)[:40]}, not a power of two")
        begin = -(-self._at // alignment) * alignment
        end = begin
        entries: dict[str, Entry] = {}
        for name, (kind, shape, offset, size) in sorted(found.items(), key=lambda item: item[1][2]):
            start = begin + offset
            if start < end:
                raise _Damaged(f"the data of {name!r} overlap those of another tensor")
            if start + size > len(self._data):
                raise _Damaged(f"the data of {name!r} end at byte {start + size:,} of {len(self._data):,}")
            entries[name] = Entry(kind, shape, start, start + size)
            end = start + size
        return entries

    def _numbers(self, kinds: str) -> tuple[Any, ...]:
        try:
            found = struct.unpack_from(f"<{kinds}", self._data, self._at)
        except struct.error:
            raise _Damaged(f"it ends at byte {len(self._data):,}, in its metadata") from None
        self._at += struct.calcsize(f"<{kinds}")
        return found

    def _text(self) -> str:
        return self._listed_texts(1)[0]

    def _listed_texts(self, count: int) -> list[str]:
        """Returns the next texts. A loop over local names, because a vocabulary has 300,000 of them."""
        self._texts += count
        if self._texts > _MAX_TEXTS:
            raise _Damaged(f"its metadata have more than {_MAX_TEXTS:,} texts")
        data, at, unpack_length = self._data, self._at, _LENGTH.unpack_from
        end = len(data) - _LENGTH.size
        found = []
        for _ in range(count):
            if at > end:
                raise _Damaged(f"it ends at byte {len(data):,}, in its metadata")
            (length,) = unpack_length(data, at)
            at += _LENGTH.size
            if length > len(data) - at or length > _MAX_ARRAY_BYTES:
                raise _Damaged(f"a text of {length:,} bytes does not fit in it")
            found.append(data[at : at + length].decode(errors="replace"))  # a token may be a part of a character
            at += length
        self._at = at
        return found

    def _value(self, kind: int, name: str) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            (value,) = self._numbers(self._format(kind, name))
            return _shortest(value) if kind == _FLOAT32 else value
        kind, count = self._numbers("IQ")
        if kind == _TEXT:
            self._check_count(f"texts of {name}", count, _MAX_TEXTS, 8)
            return self._listed_texts(count)
        size = struct.calcsize(self._format(kind, name))
        self._check_count(f"values of {name}", count, _MAX_ARRAY_BYTES // size, size)
        values = np.frombuffer(self._data, f"<{_NUMPY[kind]}", count, self._at)
        self._at += values.nbytes
        return values.tolist()

    def _format(self, kind: int, name: str) -> str:
        if kind not in _SCALARS:
            raise _Damaged(f"the metadata {name!r} have the unknown type {kind}")
        return _SCALARS[kind]

    def _check_count(self, what: str, count: int, most: int, least_bytes: int) -> None:
        if count > min(most, (len(self._data) - self._at) // least_bytes):
            raise _Damaged(f"it has {count:,} {what}, which do not fit in it")


_NUMPY = {
    kind: {"?": "b1", "f": "f4", "d": "f8"}.get(
        text, f"{'u' if text.isupper() else 'i'}{struct.calcsize('<' + text)}"
    )
    for kind, text in _SCALARS.items()
}


def _shortest(value: float) -> float:
    """Returns the shortest decimal number that rounds to a float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
