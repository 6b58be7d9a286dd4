"""The files of a text source."""

from __future__ import annotations

import glob
import os
import re
import sys
import sysconfig
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from icenet.core.errors import DataError
from icenet.core.files import path_hint

LINES = (".jsonl", ".jsonl.gz")
"""Suffixes of JSON lines: each line is an object, and a document is the text under one of its keys."""
PACKED = (".jsonl.gz", ".txt.gz")
"""Suffixes of gzip files that are unpacked while they are read."""

# parts of the folder that are not the library: installed packages, tests, a bundled editor, generated tables
_NOT_LIBRARY = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"),
    *("pydoc_data", "encodings", "_bundled", "__phello__"),
}


@dataclass(frozen=True)
class Document:
    """One file of a source.

    Attributes:
        name: Its path relative to the source.
        path: Its path.
        size, mtime_ns: Its size in bytes and time of modification when it was listed.
    """

    name: str
    path: Path
    size: int
    mtime_ns: int

    @property
    def state(self) -> bytes:
        """A line of bytes that changes when the file does."""
        return os.fsencode(f"{self.name}\0{self.size}\0{self.mtime_ns}\n")

    @property
    def lines(self) -> bool:
        """Whether it contains JSON lines."""
        return self.path.name.lower().endswith(LINES)

    @property
    def packed(self) -> bool:
        """Whether it is a gzip file that is unpacked while it is read."""
        return self.path.name.lower().endswith(PACKED)


@dataclass(frozen=True)
class Source:
    """The files of a text source.

    Attributes:
        description: Its name in messages.
        identity: Its absolute path, which does not depend on how `data.source` is written.
        documents: Its files, sorted by name.
        sole: Whether the source is a single file, which must be text. Other sources skip files that are not text.
    """

    description: str
    identity: str
    documents: list[Document]
    sole: bool = False


def find_source(source: str) -> Source:
    """Returns the files that `data.source` names: 'stdlib', a file, a folder (with its subfolders) or a glob.

    Hidden files are left out. Links to folders are followed, each folder once.

    Raises:
        DataError: The source does not exist, is empty or cannot be read.
    """
    if source == "stdlib":
        return _stdlib()
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source):
        raise DataError(f"data.source {source!r} is a URL; download it first and name the file, or a folder")
    if not source.strip():
        raise DataError("data.source is empty; name a text file, a folder, a glob, or 'stdlib'")
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            documents = _walk(path)
            if not documents:
                raise DataError(f"data.source {source!r} is a folder without files (hidden ones are ignored)")
            return Source(f"folder {source}", str(path.resolve()), documents)
        if path.is_file():
            return Source(f"file {source}", str(path.resolve()), [_document(path.name, path)], sole=True)
        if path.exists():
            raise DataError(f"data.source {source!r} is neither a file nor a folder (a device or a pipe?)")
        if glob.has_magic(source):
            return _glob(source, path)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the path; ~ of an unknown user
        raise DataError(f"data.source {source!r} cannot be read: {reason(error)}") from None
    raise DataError(f"data.source {source!r} does not exist{path_hint(path)}")


def _document(name: str, path: Path | str) -> Document:
    status = os.stat(path)
    return Document(name, Path(path), status.st_size, status.st_mtime_ns)


def _sorted(documents: list[Document]) -> list[Document]:
    return sorted(documents, key=lambda document: document.name)


def _walk(root: Path, *, suffix: str = "", without: Collection[str] = ()) -> list[Document]:
    """Returns all regular files below a folder."""

    def refuse(error: OSError) -> None:
        raise error

    documents = []
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link to a parent, or a second link to a folder
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(
            name for name in subfolders if name[0] != "." and name not in without and name != "__pycache__"
        )
        for name in files:
            path = os.path.join(folder, name)
            if name.startswith(".") or not name.endswith(suffix) or not os.path.isfile(path):
                continue
            documents.append(_document(Path(path).relative_to(root).as_posix(), path))
    return _sorted(documents)


def _glob(source: str, pattern: Path) -> Source:
    parts = pattern.parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    matches = glob.glob(str(pattern), recursive=True)
    # ** matches a file more than once
    files = sorted({match for match in matches if os.path.isfile(match)})
    if not files:
        if matches:
            raise DataError(f"data.source {source!r} matches folders but no files; '**/*' matches all files below")
        where = "" if root.is_dir() else f": there is no folder {str(root)!r}{path_hint(root)}"
        raise DataError(f"data.source {source!r} matches no files{where}")
    documents = [_document(Path(file).relative_to(root).as_posix(), file) for file in files]
    return Source(f"files {source}", str(root.resolve().joinpath(*parts[fixed:])), _sorted(documents))


def _stdlib() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    version = ".".join(map(str, sys.version_info[:3]))
    try:
        documents = _walk(root, suffix=".py", without=_NOT_LIBRARY)
    except OSError:
        documents = []
    # generated by the build: paths and flags of one machine
    documents = [document for document in documents if not document.name.startswith("_sysconfigdata")]
    if not documents:
        raise DataError(
            f"data.source 'stdlib': this Python ({sys.executable}) has no source files of its library; "
            "use another Python, or name a text file or a folder"
        )
    return Source(f"the standard library of Python {version}", f"stdlib {root.resolve()}", documents)


def reason(error: Exception) -> str:
    """Returns the cause of an error, as the end of a sentence."""
    return (getattr(error, "strerror", None) or str(error)).lower()
