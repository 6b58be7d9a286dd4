"""Canonical weights on disk: safetensors files, read lazily through memory maps and written atomically.

Names are module paths (`blocks.0.attention.q_proj.weight`), layouts are PyTorch's, metadata contain `format: pt`.
PyTorch loads such a file with `module.load_state_dict(safetensors.torch.load_file(path))`. More than
`max_shard_bytes` are split into shards like Hugging Face's: `model-00001-of-00003.safetensors`, ..., and
`model.safetensors.index.json`, which maps each name to its shard.

The bytes of a file depend only on its weights and metadata. bfloat16 arrays have the dtype `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from icenet.core.errors import MissingWeightsError, WeightsError
from icenet.core.files import staged
from icenet.core.messages import some
from icenet.core.weights import prefixes
from icenet.core.weights.safetensors import (
    DTYPES,
    Entry,
    Spec,
    dtype_name,
    open_file,
    spec_of,
    view,
    without_duplicates,
)
from icenet.core.weights.safetensors_writer import write_file

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total)."""

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
DEFAULT_NAME = "model.safetensors"
DEFAULT_INDEX = "model.safetensors.index.json"
FAMILY = "icenet_family"
"""Key of the metadata for the `model_type` of the folder of Hugging Face that weights were imported from."""
MAX_SHARD_BYTES = 5 * 10**9
_OTHER_SUFFIXES = (SUFFIX, ".pt", ".pth", ".bin", ".ckpt", ".gguf", ".h5", ".npz", ".onnx", ".msgpack")

# --- reading -----------------------------------------------------------------------------------------------


class Arrays(dict[str, Array]):
    """Weights in memory, with metadata as those of a file have.

    Args:
        arrays: The weights.
        metadata: The metadata.
        path: The file or folder that they are from, if there is one.
    """

    def __init__(self, arrays: Mapping[str, Array], metadata: Mapping[str, str], path: Path | None = None) -> None:
        super().__init__(arrays)
        self.metadata, self.path = dict(metadata), path


class StoredWeights(Mapping[str, Array]):
    """Weights of a model that are read from a file, or computed from it, when they are looked up.

    Attributes:
        path: The file or folder.
        entries: What is known of each array by name.
    """

    path: Path
    entries: Mapping[str, Any]

    def spec(self, name: str) -> Spec:
        """Returns the dtype and the shape of an array. No data are read."""
        raise NotImplementedError

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # a mapping's own method looks the array up

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class Weights(StoredWeights):
    """The weights of one or more safetensors files, sorted by name.

    An array is created from a memory map when it is looked up: a read-only, C-contiguous and aligned view.

    Attributes:
        path: The path that was opened.
        files: The safetensors files, in order.
        entries: Name -> file, dtype and shape, without reading the data.
        metadata: The metadata of the first file.
    """

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path = path
        self.files = files
        self.metadata: dict[str, str] = {}
        self._maps: dict[Path, Any] = {}
        entries: dict[str, Entry] = {}
        for number, file in enumerate(files):
            metadata, found, self._maps[file] = open_file(file)
            if number == 0:
                self.metadata = metadata
            for name in found:
                if name in entries:
                    raise WeightsError(
                        f"{path}: {name!r} is in both {entries[name].file.name} and {file.name}; "
                        "remove it from one of them, or save the weights again"
                    )
            entries.update(found)
        self.entries: Mapping[str, Entry] = dict(sorted(entries.items()))

    @property
    def nbytes(self) -> int:
        return sum(entry.stop - entry.start for entry in self.entries.values())

    def __getitem__(self, name: str) -> Array:
        entry = self.entries[name]
        return view(entry, self._maps[entry.file])

    def spec(self, name: str) -> Spec:
        """Returns the dtype and the shape of an array."""
        return Spec(DTYPES[self.entries[name].dtype], self.entries[name].shape)


def read(path: str | os.PathLike[str]) -> Weights:
    """Opens a .safetensors file, an index, or a folder with `model.safetensors` or its index.

    Checks all headers; the data are read when an array is looked up.

    Raises:
        WeightsError: A file is missing, cut short, inconsistent or not safetensors.
    """
    path = Path(path)
    if path.is_dir():
        file = path / DEFAULT_NAME
    elif path.name.endswith(INDEX_SUFFIX) or path.is_file() or path.suffix == SUFFIX:
        file = path
    else:
        raise MissingWeightsError(f"{path}: no such file or folder; give a {SUFFIX} file or the folder of one")
    index = index_of(file)
    if file.is_file() and not file.name.endswith(INDEX_SUFFIX):
        if path.is_dir() and index.is_file() and not _lists_only(index, file.name):
            logging.getLogger("icenet").warning(
                f"{path}: has {file.name} and {index.name}; the file is read, not the shards of the index, which may "
                "be another version of the model: give the path of the index to read them"
            )
        elif path.is_dir():
            warn_of_other_shards(file, {file.name})
        return Weights(path, [file])
    if index.is_file():
        return _read_index(path, index)
    if path.is_dir():
        others = sorted(entry.name for entry in path.iterdir() if entry.suffix in _OTHER_SUFFIXES)
        hint = f"give one of its files: {some(others)}" if others else "give the folder of a checkpoint"
        raise WeightsError(f"{path}: contains neither {file.name} nor its index; {hint}")
    raise MissingWeightsError(f"{path}: no such file; check the path")


def index_of(path: Path) -> Path:
    """Returns the path of the index of `x.safetensors`: `x.safetensors.index.json`."""
    return path if path.name.endswith(INDEX_SUFFIX) else path.with_name(path.name + ".index.json")


def _lists_only(index: Path, name: str) -> bool:
    """Returns whether an index lists one file, as mlx-lm writes it next to a model that is not split."""
    try:
        return set(listed_in_index(index).values()) == {name}
    except WeightsError:
        return False


def listed_in_index(index: Path, suffixes: Sequence[str] = (SUFFIX,)) -> dict[str, str]:
    """Returns the name of the shard of each weight that an index lists.

    Args:
        index: A JSON file with `weight_map`, which maps names of weights to files.
        suffixes: Extensions that the files may have.

    Raises:
        WeightsError: It is not an index, or shards are missing.
    """
    try:
        listed = json.loads(index.read_bytes(), object_pairs_hook=without_duplicates)["weight_map"]
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise ValueError("its weight_map does not map names to files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = "it has no weight_map" if isinstance(error, KeyError) else error
        raise WeightsError(f"{index}: not an index of shards ({reason}); copy or save it again") from None
    for file in listed.values():
        # only plain names: an index must not be able to open files outside its folder
        if file in ("", ".", "..") or re.search(r"[/\\:\x00]", file) or not file.endswith(tuple(suffixes)):
            raise WeightsError(
                f"{index}: shard {file!r} must be a {' or '.join(suffixes)} file in the same folder; save it again"
            )
    files = sorted(set(listed.values()))
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise WeightsError(
            f"{index}: {len(missing)} of {len(files)} shards are missing ({some(missing)}); "
            f"copy them to {index.parent}"
        )
    return dict(listed)


def warn_of_other_shards(file: Path, read: Collection[str]) -> None:
    """Logs a warning if shards are next to weights that are read without them.

    Args:
        file: The file of the weights without shards, such as `model.safetensors`; it need not exist.
        read: Names of the files that are read.
    """
    beginning = file.stem + "-"
    others = sorted(
        entry.name
        for entry in file.parent.iterdir()
        if entry.name.startswith(beginning) and entry.suffix == file.suffix and entry.name not in read
    )
    if others:
        reason = f"{file.name} is read" if file.name in read else f"{file.name}.index.json does not list them"
        logging.getLogger("icenet").warning(
            f"{file.parent}: shards are not read, because {reason}: {some(others)}; remove them, or copy the "
            "index that lists them"
        )


def _read_index(path: Path, index: Path) -> Weights:
    listed = listed_in_index(index)
    warn_of_other_shards(index.with_name(index.name.removesuffix(".index.json")), set(listed.values()))
    weights = Weights(path, [index.parent / file for file in sorted(set(listed.values()))])
    for name, file in listed.items():
        if name not in weights.entries or weights.entries[name].file.name != file:
            raise WeightsError(
                f"{index}: lists {name!r} in {file}, which does not contain it; save the weights again"
            )
    unlisted = [name for name in weights if name not in listed]
    if unlisted:
        raise WeightsError(
            f"{index}: does not list {some(unlisted)}, which its shards contain; save the weights again"
        )
    return weights


# --- writing -----------------------------------------------------------------------------------------------


def target(path: str | os.PathLike[str]) -> Path:
    """Returns the file that `write` writes: `path` if it is a .safetensors file, else `path/model.safetensors`."""
    path = Path(path)
    return path if path.suffix == SUFFIX and not path.is_dir() else path / DEFAULT_NAME


def write(
    path: str | os.PathLike[str],
    weights: Mapping[str, Array],
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    companions: Mapping[str, bytes] = {},
    durable: bool = True,
) -> list[Path]:
    """Writes weights to a .safetensors file or into a folder, as `model.safetensors`; returns the files.

    The write is atomic: after a crash a single file is the old or the new one. Of several files the old index and the
    last companion are removed first and the new ones written last, so a crash leaves files that cannot be read, never
    a mixture. Shards of an old index are removed at the end.

    Args:
        path: A .safetensors file, or a folder, which is created if absent.
        weights: Name -> array. A lazy mapping is evaluated one array at a time.
        metadata: Text to store in addition to `format: pt`, which it can override.
        max_shard_bytes: Size of the arrays above which the weights are split, in order of names; None: never.
        progress: Called after each array.
        companions: Content of files to write in the same folder, by name, after the weights. Readers must ignore
            the folder if the last one is missing.
        durable: See `staged`.

    Raises:
        WeightsError: A name or a dtype cannot be stored.
        FileError: A file cannot be written, for example because the disk is full.
    """
    path = target(path)
    for name in weights:
        if not isinstance(name, str) or name in ("", "__metadata__") or not _is_unicode(name):
            raise WeightsError(f"{path}: {name!r} cannot be the name of a parameter; rename it")
    described = {"format": "pt", **(metadata or {})}
    for key, value in described.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise WeightsError(f"{path}: metadata must map text to text, not {key!r} to {value!r}")
    specs = {name: spec_of(weights, name) for name in sorted(weights)}
    for spec in specs.values():
        dtype_name(spec.dtype)  # raises before anything is written
    sizes = {name: spec.nbytes for name, spec in specs.items()}
    total, done = sum(sizes.values()), 0

    def written(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    shards = _split(sizes, max_shard_bytes)
    files = [path]
    if len(shards) > 1:
        files = [path.with_name(f"{path.stem}-{i + 1:05}-of-{len(shards):05}{SUFFIX}") for i in range(len(shards))]
    index = index_of(path)
    others = {path.parent / name: content for name, content in companions.items()}
    absent_meanwhile = [*([index] if len(shards) > 1 else []), *list(others)[-1:]]
    earlier = _shards_of(index)
    with staged(path, absent_meanwhile, durable=durable) as stage:
        for file, names in zip(files, shards, strict=True):
            with stage.open(file) as out:
                write_file(out, weights, {name: specs[name] for name in names}, described, written)
        if len(shards) > 1:
            places = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
            table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            with stage.open(index) as out:
                out.write((json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode())
        for other, content in others.items():
            with stage.open(other) as out:
                out.write(content)
    if len(shards) > 1:
        path.unlink(missing_ok=True)  # `read` prefers a single file to an index
        files.append(index)
    for outdated in {*earlier, *([index] if earlier else [])} - set(files):
        outdated.unlink(missing_ok=True)
    return [*files, *others]


def _shards_of(index: Path) -> list[Path]:
    """Returns the shards that an existing index lists, of the names that `write` gives them."""
    stem = re.escape(index.name.removesuffix(INDEX_SUFFIX))
    try:
        listed = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # no index, or a damaged one
        return []
    names = [name for name in listed if isinstance(name, str)]
    return [index.with_name(name) for name in names if re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}\.safetensors", name)]


def _is_unicode(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _split(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Returns the names of each shard, of at most `limit` bytes; a larger array is alone in its shard."""
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


# --- checking ----------------------------------------------------------------------------------------------


def checksum(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file in hexadecimal. Raises WeightsError if the file cannot be read."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); check path and permissions") from error
    return digest.hexdigest()


def shapes(weights: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array by name. No data are read."""
    return {name: spec_of(weights, name).shape for name in weights}


def check(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    source: str = "the weights",
    remedy: str = "",
) -> None:
    """Checks that two tables of names and shapes are equal.

    Args:
        expected: Name -> shape that the model has.
        found: Name -> shape of the weights.
        source: Beginning of the message, such as a path.
        remedy: End of the message; by default the config, or the option of `icenet convert` that removes prefixes.

    Raises:
        WeightsError: They differ. The message names the first three parameters of each kind of difference, with the
            nearest expected name for an unexpected one, and counts the others.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    misshapen = [name for name in expected if name in found and tuple(found[name]) != tuple(expected[name])]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({some(missing)})")
    if extra:
        near = [difflib.get_close_matches(name, missing or expected, n=1) for name in extra[:3]]
        shown = [
            f"{name}, nearest is {match[0]}" if match else name for name, match in zip(extra, near, strict=False)
        ]
        problems.append(f"{len(extra)} unexpected ({some(shown + extra[3:])})")
    if misshapen:
        shown = [f"{name} is {list(found[name])}, not {list(expected[name])}" for name in misshapen[:3]]
        problems.append(f"{len(misshapen)} of another shape ({some(shown + misshapen[3:])})")
    if problems:
        found_prefixes = prefixes.suggest_prefixes(found, expected) if extra else []
        if found_prefixes:
            raise WeightsError(
                f"{source}: not the parameters of this model: {len(extra)} names have the prefix "
                f"{' and '.join(found_prefixes)}; {remedy or prefixes.advice(found_prefixes)}"
            )
        raise WeightsError(
            f"{source}: not the parameters of this model: {'; '.join(problems)}; "
            f"{remedy or 'use the config they belong to'}"
        )
