"""Which files a text source names, and their text in pieces."""

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
"""The names of files of JSON lines end in these: each line is a text, under a key of an object."""
PACKED = (".jsonl.gz", ".txt.gz")
"""And those of packed files, which are read as what was packed."""

# not the library itself: what pip put there, its tests, a bundled editor, and generated tables
_NOT_LIBRARY = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"),
    *("pydoc_data", "encodings", "_bundled", "__phello__"),
}


@dataclass(frozen=True)
class Document:
    """One file of a source: its path, its name within the source, and what tells that it has changed."""

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
        """Whether it holds JSON lines."""
        return self.path.name.lower().endswith(LINES)

    @property
    def packed(self) -> bool:
        """Whether it is a gzip file to be read through."""
        return self.path.name.lower().endswith(PACKED)


@dataclass(frozen=True)
class Source:
    """The files of a text source, sorted by name. `sole`: the one file that was named, which must be text."""

    description: str
    identity: str
    """The same for the same source, however its path was written."""
    documents: list[Document]
    sole: bool = False


def find_source(source: str) -> Source:
    """The files that `data.source` names: 'stdlib', a file, a folder (with all below it) or a glob.

    Hidden files are passed over. Links to folders are followed, each folder once.

    Raises:
        DataError: nothing is there, or nothing that can be read.
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
                raise DataError(f"data.source {source!r} is a folder without files (hidden ones apart)")
            return Source(f"folder {source}", str(path.resolve()), documents)
        if path.is_file():
            return Source(f"file {source}", str(path.resolve()), [_document(path.name, path)], sole=True)
        if path.exists():
            raise DataError(f"data.source {source!r} is neither a file nor a folder (a device or a pipe?)")
        if glob.has_magic(source):
            return _glob(source, path)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the path; ~ of an unknown user
        raise DataError(f"data.source {source!r} cannot be read: {reason(error)}") from None
    raise DataError(f"data.source {source!r} is not there{path_hint(path)}")


def _document(name: str, path: Path | str) -> Document:
    status = os.stat(path)
    return Document(name, Path(path), status.st_size, status.st_mtime_ns)


def _sorted(documents: list[Document]) -> list[Document]:
    return sorted(documents, key=lambda document: document.name)


def _walk(root: Path, *, suffix: str = "", without: Collection[str] = ()) -> list[Document]:
    """All regular files below a folder, named by their path from it."""

    def refuse(error: OSError) -> None:
        raise error

    documents = []
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back up, or a second link to one folder
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
    # ** gives a file more than once
    files = sorted({match for match in matches if os.path.isfile(match)})
    if not files:
        if matches:
            raise DataError(f"data.source {source!r} matches folders but no files; '**/*' takes all below")
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
    # written by the build, not by people: paths and flags of one machine
    documents = [document for document in documents if not document.name.startswith("_sysconfigdata")]
    if not documents:
        raise DataError(
            f"data.source 'stdlib': this Python ({sys.executable}) comes without the source of its library; "
            "use another Python, or name a text file or a folder"
        )
    return Source(f"the standard library of Python {version}", f"stdlib {root.resolve()}", documents)


def reason(error: Exception) -> str:
    """What went wrong with a file, as the end of a sentence."""
    return (getattr(error, "strerror", None) or str(error)).lower()
