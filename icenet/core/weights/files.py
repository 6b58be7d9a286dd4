"""Canonical weights on disk: safetensors files, read lazily through memory maps and written atomically.

The form: names are module paths (`blocks.0.attention.q_proj.weight`), layouts are PyTorch's, metadata holds
`format: pt`. `torch.nn.Module.load_state_dict(safetensors.torch.load_file(path))` takes such a file as it is.
Weights beyond `max_shard_bytes` are split as Hugging Face does: `model-00001-of-00003.safetensors`, ..., and
`model.safetensors.index.json`, which says which shard holds which name.

The bytes of a file are a pure function of its weights and metadata: those that the safetensors package
writes, but for the order of its metadata, which there is random. bfloat16 arrays have the dtype
`tensor_file.BFLOAT16`.

Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core.errors import WeightsError
from icenet.core.files import staged
from icenet.core.weights.safetensors import (
    BFLOAT16,
    DTYPES,
    RANK,
    Entry,
    bfloat16_to_float32,
    dtype_name,
    open_file,
    parse_json,
)

__all__ = [
    "BFLOAT16",
    "Weights",
    "bfloat16_to_float32",
    "check",
    "checksum",
    "read",
    "shapes",
    "target",
    "write",
]

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
DEFAULT_NAME = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9

# --- reading -----------------------------------------------------------------------------------------------


class Weights(Mapping[str, Array]):
    """Weights of one or more safetensors files; an array is made from the memory map when it is asked for.

    Arrays are read-only views of the file, C-contiguous and aligned. `metadata` is that of the first file,
    `files` the files in order, `entries` the name, dtype and shape of everything without reading it.
    """

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path = path
        self.files = files
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self._maps: dict[Path, Any] = {}
        for number, file in enumerate(files):
            metadata, entries, self._maps[file] = open_file(file)
            if number == 0:
                self.metadata = metadata
            for name, entry in entries.items():
                if name in self.entries:
                    raise WeightsError(
                        f"{path}: {name!r} is in both {self.entries[name].file.name} and {file.name}; "
                        "keep it in one of them, or save the weights again"
                    )
                self.entries[name] = entry
        self.entries = dict(sorted(self.entries.items()))

    @property
    def nbytes(self) -> int:
        return sum(entry.stop - entry.start for entry in self.entries.values())

    def __getitem__(self, name: str) -> Array:
        entry = self.entries[name]
        dtype, count = DTYPES[entry.dtype], math.prod(entry.shape)
        if count == 0:
            return np.empty(entry.shape, dtype)
        flat = np.frombuffer(self._maps[entry.file], dtype, count, entry.start)
        # Other writers need not align; frameworks may refuse such a view.
        return (flat if flat.flags.aligned else flat.copy()).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read(path: str | os.PathLike[str]) -> Weights:
    """The weights of a .safetensors file, an index, or a folder with `model.safetensors` or its index.

    Headers are checked in full, data are not touched until an array is asked for. Raises WeightsError, naming
    the file and the way out, for files that are missing, cut short, inconsistent or not safetensors.
    """
    path = Path(path)
    if path.is_dir():
        whole = path / DEFAULT_NAME
    elif path.name.endswith(INDEX_SUFFIX) or path.is_file() or path.suffix == SUFFIX:
        whole = path
    else:
        raise WeightsError(f"{path}: no such file or folder; give a {SUFFIX} file or the folder of one")
    if whole.is_file() and not whole.name.endswith(INDEX_SUFFIX):
        return Weights(path, [whole])
    index = index_of(whole)
    if index.is_file():
        return _read_index(path, index)
    if path.is_dir():
        raise WeightsError(f"{path}: holds neither {whole.name} nor its index; give the folder of a checkpoint")
    raise WeightsError(f"{path}: no such file; check the path")


def index_of(path: Path) -> Path:
    """The index beside `x.safetensors`: `x.safetensors.index.json`."""
    return path if path.name.endswith(INDEX_SUFFIX) else path.with_name(path.name + ".index.json")


def _read_index(path: Path, index: Path) -> Weights:
    try:
        content = parse_json(index.read_bytes())
        listed = content["weight_map"]
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise ValueError("its weight_map is not a table of names and files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"not an index of shards ({'it has no weight_map' if isinstance(error, KeyError) else error})"
        raise WeightsError(f"{index}: {what}; copy or save it again") from None
    for file in listed.values():
        # Only plain names: an index from elsewhere must not make us open files outside its folder.
        if file in ("", ".", "..") or re.search(r"[/\\:\x00]", file) or not file.endswith(SUFFIX):
            raise WeightsError(f"{index}: shard {file!r} must be a {SUFFIX} file in the same folder; save it again")
    files = sorted(set(listed.values()))
    absent = [file for file in files if not (index.parent / file).is_file()]
    if absent:
        raise WeightsError(
            f"{index}: {len(absent)} of {len(files)} shards are missing ({_some(absent)}); "
            f"copy them to {index.parent}"
        )
    weights = Weights(path, [index.parent / file for file in files])
    for name, file in listed.items():
        if name not in weights.entries or weights.entries[name].file.name != file:
            raise WeightsError(f"{index}: {file} does not hold {name!r}, as it says; save the weights again")
    unlisted = [name for name in weights if name not in listed]
    if unlisted:
        raise WeightsError(f"{index}: does not list {_some(unlisted)} of its shards; save the weights again")
    return weights


# --- writing -----------------------------------------------------------------------------------------------


def target(path: str | os.PathLike[str]) -> Path:
    """The .safetensors file that `path` stands for: itself, or `model.safetensors` in the folder `path`."""
    path = Path(path)
    return path if path.suffix == SUFFIX and not path.is_dir() else path / DEFAULT_NAME


def write(
    path: str | os.PathLike[str],
    weights: Mapping[str, Array],
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Writes weights to a .safetensors file or into a folder (as `model.safetensors`); returns the files.

    Arrays are taken one at a time (a lazy mapping is never held whole) and stored C-contiguous,
    little-endian. `metadata` (text to text) is stored beside `format: pt`, which it may override. Beyond
    `max_shard_bytes` of arrays (None: never) the weights are split into shards with an index, filled in order
    of names.

    Written under temporary names, synced, then renamed: after a crash a single file is the old or the new
    one. The renames of several shards are not one act, so during them the old index is gone: what a crash
    leaves then is an error to read, never a mixture.

    Raises WeightsError for a name or dtype that cannot be stored, and for a full or refusing disk.
    """
    path = target(path)
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in weights:
        if not isinstance(name, str) or name in ("", "__metadata__") or not _encodable(name):
            raise WeightsError(f"{path}: {name!r} cannot be the name of a parameter; rename it")
        array = weights[name]
        specs[name] = (dtype_name(array.dtype), array.shape)
    specs = dict(sorted(specs.items()))
    sizes = {name: math.prod(shape) * DTYPES[dtype].itemsize for name, (dtype, shape) in specs.items()}
    described = {"format": "pt", **(metadata or {})}
    for key, value in described.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise WeightsError(f"{path}: metadata must map text to text, not {key!r} to {value!r}")
    shards = _split(sizes, max_shard_bytes)
    if len(shards) == 1:
        files = [path]
    else:
        files = [path.with_name(f"{path.stem}-{i + 1:05}-of-{len(shards):05}{SUFFIX}") for i in range(len(shards))]
    done, total = 0, sum(sizes.values())
    # An index beside shards of two saves would be a silent mixture: it is away while they change.
    with staged(path, absent_meanwhile=index_of(path) if len(shards) > 1 else None) as stage:
        for file, names in zip(files, shards, strict=True):
            names = sorted(names, key=lambda name: (-RANK[specs[name][0]], name))
            with stage.open(file) as out:
                out.write(_header(names, specs, sizes, described))
                for name in names:
                    data = _bytes(weights[name])
                    if data.nbytes != sizes[name]:
                        raise WeightsError(f"{path}: {name!r} changed while it was written; write again")
                    out.write(data.data)
                    done += data.nbytes
                    if progress is not None:
                        progress(done, total)
        if len(shards) > 1:
            places = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            with stage.open(index_of(path)) as out:
                out.write((json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())
    if len(shards) > 1:
        path.unlink(missing_ok=True)  # an older whole file would be read before the index
        return [*files, index_of(path)]
    return files


def _encodable(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _split(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    if limit is not None and limit <= 0:
        raise WeightsError(f"max_shard_bytes is {limit}; give a positive number, or None for one file")
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if limit is not None and shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _header(
    names: list[str],
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    sizes: Mapping[str, int],
    metadata: Mapping[str, str],
) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name in names:
        dtype, shape = specs[name]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + sizes[name]]}
        start += sizes[name]
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(array: Array) -> npt.NDArray[np.uint8]:
    """The array's little-endian bytes in C order; a view where it can be."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype.names is None and flat.dtype.name != "bfloat16":
        flat = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
    return flat.view(np.uint8)


# --- checking ----------------------------------------------------------------------------------------------


def checksum(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); check path and permissions") from error
    return digest.hexdigest()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def shapes(weights: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """The shape of each array, by name; nothing is read from the disk."""
    return {name: tuple(array.shape) for name, array in weights.items()}


def check(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str = "the weights"
) -> None:
    """Raises WeightsError unless `found` has exactly the names and shapes of `expected`.

    The one line names the first few parameters that are missing, unexpected (with the nearest expected name)
    and misshapen, and counts the others. `source` begins it: a path, say.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    misshapen = [name for name in expected if name in found and tuple(found[name]) != tuple(expected[name])]
    told = []
    if missing:
        told.append(f"{len(missing)} missing ({_some(missing)})")
    if extra:
        near = [difflib.get_close_matches(name, missing or expected, n=1) for name in extra[:3]]
        shown = [
            f"{name}, nearest is {match[0]}" if match else name for name, match in zip(extra, near, strict=False)
        ]
        told.append(f"{len(extra)} unexpected ({_some(shown + extra[3:])})")
    if misshapen:
        shown = [f"{name} is {list(found[name])}, not {list(expected[name])}" for name in misshapen[:3]]
        told.append(f"{len(misshapen)} of another shape ({_some(shown + misshapen[3:])})")
    if told:
        raise WeightsError(f"{source}: does not fit: {'; '.join(told)}; use the config it was made with")
