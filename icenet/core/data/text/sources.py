"""The files of a text source."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from typing_extensions import Self

from icenet.core.data.text.left_out import FOLDERS, OF_LISTING, LeftOut
from icenet.core.errors import DataError
from icenet.core.files import path_hint
from icenet.core.listing import UNREADABLE, distinct_files, walk_folders
from icenet.core.messages import option

LINES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")
"""Suffixes of JSON lines: each line is an object, and a document is the text under one of its keys."""
GZIP = ".gz"
"""Suffix after one of `LINES`, `.txt` or `.json` of a gzip file that is unpacked while it is read."""

_UNPACK = "unpack it first"
_EXPORT = "export its text as JSON lines (.jsonl) first"
_CONVERT = "convert it to plain text first"
_FORMATS = {
    _UNPACK: (".gz", ".tgz", ".zip", ".tar", ".zst", ".zstd", ".xz", ".bz2", ".lz4", ".lzma", ".7z", ".rar"),
    _EXPORT: (".parquet", ".arrow", ".feather", ".orc", ".avro", ".sqlite", ".xlsx", ".xls", ".ods", ".tfrecord"),
    _CONVERT: (".pdf", ".docx", ".odt", ".epub", ".mobi", ".pptx", ".odp", ".djvu"),
}
"""Suffixes of files that hold text in a binary format, and the way to a text of them."""
_WAY_OUT = {suffix: way_out for way_out, suffixes in _FORMATS.items() for suffix in suffixes}
_BINARY = (
    *(".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ico", ".heic", ".psd", ".avif"),
    *(".mp3", ".wav", ".flac", ".ogg", ".m4a", ".mp4", ".mkv", ".mov", ".avi", ".webm", ".doc", ".ppt", ".db"),
    *(".bin", ".dat", ".npy", ".npz", ".pt", ".pth", ".ckpt", ".safetensors", ".gguf", ".onnx", ".pkl", ".pickle"),
    *(".so", ".dylib", ".dll", ".exe", ".o", ".a", ".pyc", ".class", ".jar", ".whl", ".ttf", ".otf", ".woff"),
)
"""Suffixes of other binary formats. Such a file is text if its content is."""

# parts of the folder that are not the library: installed packages, tests, a bundled editor, generated tables
_NOT_LIBRARY = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"),
    *("pydoc_data", "encodings", "_bundled", "__phello__", "__pycache__"),
}


@dataclass(frozen=True)
class Document:
    """One file of a source.

    Attributes:
        name: Its path relative to the source.
        path: Its path.
        size, mtime_ns: Its size in bytes and time of modification when it was listed.
        ctime_ns: Time when its content or its times were set. Unlike the time of modification, which copies keep
            (cp -p, rsync -t, tar), it always changes with the content.
    """

    name: str
    path: Path
    size: int
    mtime_ns: int
    ctime_ns: int = 0

    @classmethod
    def of(cls, name: str, path: Path, status: os.stat_result) -> Self:
        """Returns the document of a file with this status."""
        return cls(name, path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def state(self) -> bytes:
        """A line of bytes that changes when the file does."""
        return os.fsencode(f"{self.name}\0{self.size}\0{self.mtime_ns}\0{self.ctime_ns}\n")

    @property
    def packed(self) -> bool:
        """Whether it is a gzip file that is unpacked while it is read."""
        stem, suffix = os.path.splitext(self.path.name.lower())
        return suffix == GZIP and stem.endswith((*LINES, ".txt", ".json"))

    @property
    def _suffix(self) -> str:
        name = self.path.name.lower()
        return os.path.splitext(name.removesuffix(GZIP) if self.packed else name)[1]

    @property
    def lines(self) -> bool:
        """Whether its name says that it contains JSON lines."""
        return self._suffix in LINES

    @property
    def json(self) -> bool:
        """Whether its name says that it contains JSON, which may be JSON lines."""
        return self._suffix == ".json"

    @property
    def way_out(self) -> str | None:
        """The way to a text, if its name says that it holds text in a binary format."""
        return _WAY_OUT.get(self._suffix)

    @property
    def binary(self) -> bool:
        """Whether its name says that it is not text."""
        return self._suffix in _BINARY


@dataclass(frozen=True)
class Source:
    """The files of a text source.

    Attributes:
        description: Its name in messages.
        identity: Its absolute path, which does not depend on how `data.source` is written.
        documents: Its files, sorted by name.
        sole: Whether the source is a single file, which must be text. Other sources leave out binary files.
        left_out: What the listing leaves out.
    """

    description: str
    identity: str
    documents: list[Document]
    sole: bool = False
    left_out: LeftOut = field(default_factory=LeftOut)


def find_source(source: str, errors: str = "stop") -> Source:
    """Returns the files that `data.source` names: 'stdlib', a file, a folder (with its subfolders) or a glob.

    Hidden files are left out. Links to files and folders are followed, also out of the source. Each file and each
    folder is read once, whatever the number of links to it.

    Args:
        source: The value of `data.source`.
        errors: The value of `data.errors`: skip leaves out folders that cannot be read.

    Raises:
        DataError: The source does not exist, is empty or cannot be read.
    """
    if source == "stdlib":
        return _stdlib()
    named = f"{option('data.source')} {source!r}"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source):
        raise DataError(f"{named} is a URL; download it first and name the file, or a folder")
    if not source.strip():
        raise DataError(f"{option('data.source')} is empty; name a text file, a folder, a glob, or 'stdlib'")
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            listing = _Listing(path, errors)
            documents = listing.documents(listing.walk(str(path)))
            if not documents:
                raise DataError(f"{named} is a folder without files (hidden ones are ignored){listing.remark()}")
            return Source(f"folder {source}", str(path.resolve()), documents, left_out=listing.left_out)
        if path.is_file():
            document = Document.of(path.name, path, os.stat(path))
            return Source(f"file {source}", str(path.resolve()), [document], sole=True)
        if path.exists():
            raise DataError(f"{named} is neither a file nor a folder (a device or a pipe?)")
        if glob.has_magic(source):
            return _glob(source, path, errors)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the path; ~ of an unknown user
        raise DataError(f"{named} cannot be read: {reason(error)}") from None
    hint = path_hint(path)
    way_out = "" if "did you mean" in hint else f"; set {option('data.source')} to where it is"
    raise DataError(f"{named} does not exist{hint}{way_out}")


class _Listing:
    """The files below a folder, and what is left out of them."""

    def __init__(self, root: Path, errors: str = "stop") -> None:
        self.root = root
        self.left_out = LeftOut()
        self._errors = errors

    def skip(self, kind: str, path: str, details: str) -> None:
        """Records what `icenet.core.files` leaves out. Raises DataError for a folder that cannot be read."""
        if kind == UNREADABLE and self._errors != "skip":
            raise DataError(
                f"{option('data.source')}: cannot read {path}: {details}; change its permissions, or leave it out "
                f"with {option('data.errors=skip')}"
            )
        self.left_out.add(OF_LISTING[kind], f"{self._name(path)}: {details}" if details else self._name(path))

    def remark(self) -> str:
        """Returns what is left out, as the end of a sentence."""
        return f"; {self.left_out.summary()}" if self.left_out else ""

    def walk(self, folder: str, ignore: Collection[str] = ("__pycache__",)) -> Iterator[str]:
        """Yields the paths of all files in a folder and its subfolders, without hidden ones."""
        for parent, names in walk_folders(folder, self.skip, ignore, enter_runs=False):
            yield from (os.path.join(parent, name) for name in names)

    def match(self, folder: str, parts: Sequence[str]) -> Iterator[str]:
        """Yields the paths that a pattern matches, like `glob.glob`, but visits each folder once for each `**`.

        Args:
            folder: A folder.
            parts: The parts of the pattern, relative to the folder.
        """
        first, rest = parts[0], parts[1:]
        if first == "**":
            if not rest:
                yield from self.walk(folder, ())
                return
            for parent, _ in walk_folders(folder, self.skip, enter_runs=False):
                yield from self.match(parent, rest)
            return
        if glob.has_magic(first):
            try:
                names = [name for name in os.listdir(folder) if name[0] != "." or first[0] == "."]
            except OSError as error:
                self.skip(UNREADABLE, folder, reason(error))
                return
            found = [os.path.join(folder, name) for name in sorted(fnmatch.filter(names, first))]
        else:
            found = [os.path.join(folder, first)]
        for path in found:
            if not rest:
                if os.path.lexists(path):
                    yield path
            elif os.path.isdir(path):
                yield from self.match(path, rest)

    def documents(self, paths: Iterable[str]) -> list[Document]:
        """Returns the documents of paths, sorted by name, each file once."""
        found = [
            Document.of(self._name(path), Path(path), status)
            for path, status in distinct_files(paths, self.skip).items()
        ]
        return sorted(found, key=lambda document: document.name)

    def _name(self, path: str) -> str:
        return Path(path).relative_to(self.root).as_posix()


def _glob(source: str, pattern: Path, errors: str) -> Source:
    parts = pattern.parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    listing = _Listing(root, errors)
    matches = sorted(set(listing.match(str(root), parts[fixed:]))) if root.is_dir() else []
    folders = [match for match in matches if os.path.isdir(match)]
    documents = listing.documents(set(matches) - set(folders))
    if not documents:
        named = f"{option('data.source')} {source!r}"
        if folders:
            raise DataError(f"{named} matches folders but no files; '**/*' matches all files below")
        where = "" if root.is_dir() else f": there is no folder {str(root)!r}{path_hint(root)}"
        raise DataError(f"{named} matches no files{where}{listing.remark()}")
    if "**" not in parts:
        for folder in folders:
            listing.left_out.add(FOLDERS, Path(folder).relative_to(root).as_posix())
    identity = str(root.resolve().joinpath(*parts[fixed:]))
    return Source(f"files {source}", identity, documents, left_out=listing.left_out)


def _stdlib() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    version = ".".join(map(str, sys.version_info[:3]))
    listing = _Listing(root, "skip")
    # generated by the build: paths and flags of one machine
    documents = [
        document
        for document in listing.documents(
            path for path in listing.walk(str(root), _NOT_LIBRARY) if path[-3:] == ".py"
        )
        if not document.name.startswith("_sysconfigdata")
    ]
    if not documents:
        raise DataError(
            f"{option('data.source')} 'stdlib': this Python ({sys.executable}) has no source files of its library; "
            "use another Python, or name a text file or a folder"
        )
    return Source(f"the standard library of Python {version}", f"stdlib {root.resolve()}", documents)


def reason(error: Exception) -> str:
    """Returns the cause of an error, as the end of a sentence."""
    return (getattr(error, "strerror", None) or str(error)).lower()
