"""Identifies files of weights by their content. Nothing in a file is unpickled."""

from __future__ import annotations

import codecs
import contextlib
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

from icenet.core.files import LFS_POINTER, LFS_REMEDY

SAFETENSORS = "safetensors"
PICKLE = "pickle"
"""A file that `torch.save` wrote, as a zip file or in the older format."""
OTHER = "other"
TEXT = "text"

_TORCH_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
"""The number with which `torch.save` began a file before version 1.6, as a pickled integer."""
_MAGIC = {
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file, such as Keras writes", "save the weights from the program that wrote it"),
    b"GGUF": (
        "a GGUF file of llama.cpp",
        "a model of its own: icenet.load and icenet convert read it without --from",
    ),
    b"\x93NUMPY": ("a numpy array", "a file of weights has names: use safetensors.numpy.save_file"),
    b"\x1f\x8b": ("a gzip file", "unpack it first"),
    b"BZh": ("a bzip2 file", "unpack it first"),
    b"\xfd7zXZ\x00": ("an xz file", "unpack it first"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "unpack it first"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it first"),
    LFS_POINTER: ("a Git LFS pointer, not the weights", LFS_REMEDY),
}


class Format(NamedTuple):
    """What a file is."""

    kind: str
    """SAFETENSORS, PICKLE, TEXT or OTHER."""
    name: str
    """In words: `a GGUF file of llama.cpp`; empty if it is unknown."""
    remedy: str = ""
    """What to do with it."""


UNKNOWN = Format(OTHER, "")


def explain(path: Path) -> tuple[str, str] | None:
    """Returns `is a GGUF file of llama.cpp` and the remedy; None for a file of safetensors or an unknown one."""
    found = identify(path)
    if found.kind == SAFETENSORS or not found.name:
        return None
    return f"is {found.name}", found.remedy or f"icenet convert {path} NEW.safetensors --to canonical reads it"


def identify(path: Path) -> Format:
    """Returns what a file is, from its first bytes and the table of a zip file; UNKNOWN if it cannot be read."""
    try:
        with path.open("rb") as file:
            head, size = file.read(4096), path.stat().st_size
    except OSError:
        return UNKNOWN
    if not head:
        return Format(TEXT, "an empty file", "copy or save it again")
    if head.startswith(b"PK\x03\x04"):
        return _identify_zip(path)
    for magic, (name, remedy) in _MAGIC.items():
        if head.startswith(magic):
            return Format(OTHER, name, remedy)
    if head[0] == 0x80 and len(head) > 1 and 2 <= head[1] <= 5 and head[2:8] != bytes(6):
        if _TORCH_MAGIC in head[:16]:
            return Format(PICKLE, "a file of torch.save")
        return Format(PICKLE, "a pickle")
    if head[4:8] == b"TFL3":
        return Format(OTHER, "a TensorFlow Lite model", "save the weights from the program that wrote it")
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= max(size, 1 << 27):
        return Format(SAFETENSORS, "a safetensors file")
    if head[257:262] == b"ustar":
        return Format(OTHER, "a tar archive", "unpack it first")
    if not head.strip(b"\x00"):
        return Format(OTHER, "a file of zeros, as an incomplete download leaves it", "copy or download it again")
    return _identify_text(head, path) or _identify_onnx(head) or UNKNOWN


def _identify_zip(path: Path) -> Format:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return Format(OTHER, "a zip file that is cut short or damaged", "copy or save it again")
    ends = {name.rpartition("/")[2] for name in names}
    if "data.pkl" in ends:
        if "constants.pkl" in ends or any("/code/" in name for name in names):
            return Format(
                OTHER, "a TorchScript program", "save torch.jit.load(path).state_dict() with torch.save first"
            )
        return Format(PICKLE, "a file of torch.save")
    if any(name.endswith(".npy") for name in names):
        return Format(OTHER, "a numpy archive (.npz)", "save its arrays with safetensors.numpy.save_file first")
    if "model.weights.h5" in ends:
        return Format(OTHER, "a Keras model", "save the weights from Keras")
    if any("archive_format" in name or name.endswith((".pt2", "serialized_exported_program.json")) for name in names):
        return Format(OTHER, "a program of torch.export", "save its state_dict with torch.save first")
    return Format(OTHER, "a zip file", "unpack it first")


def _identify_text(head: bytes, path: Path) -> Format | None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:14].lower().startswith((b"<!doctype html", b"<html")):
        return Format(TEXT, "a web page, as a failed download leaves it", "download it again")
    if text.startswith(b"<?xml"):
        return Format(TEXT, "an XML text, as a failed download leaves it", "download it again")
    if text.startswith(b"{"):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            content = json.loads(path.read_bytes())
            if isinstance(content, dict) and "weight_map" in content:
                return Format(
                    TEXT, "an index of shards", "its name must end in .safetensors.index.json or .bin.index.json"
                )
            return Format(TEXT, "a JSON text", "give the file of the weights")
    try:
        characters = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last one may be cut
    except UnicodeDecodeError:
        return None
    if all(character.isprintable() or character in "\t\r\n\f" for character in characters):
        return Format(TEXT, "a text file", "give the file of the weights")
    return None


def _identify_onnx(head: bytes) -> Format | None:
    # a ModelProto begins with ir_version (field 1), followed by opset_import, producer_name or the graph
    if head[0] == 0x08 and len(head) > 2 and 1 <= head[1] < 32 and head[2] in (0x12, 0x1A, 0x3A, 0x42):
        return Format(OTHER, "an ONNX model", "save the weights of the model from which it was exported")
    return None
