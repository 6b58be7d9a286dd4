"""Lists the files and folders that a user names: each once, whatever the number of links to it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

LINKED_TWICE = "a second link to what is already listed"
BROKEN_LINK = "a link to nothing"
NOT_A_FILE = "a device, a pipe or a socket"
UNREADABLE = "cannot be read"
RUN = "the folder of a run"

OnSkip = Callable[[str, str, str], None]
"""Receives what a listing leaves out: the reason (one of the five above), the path, and details or an empty text."""


def identity(path: str | Path, status: os.stat_result | None = None) -> object:
    """Returns a value that is equal for all names of a file or folder: links, hard links and bind mounts too."""
    status = status or os.stat(path)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)  # 0 on some network drives


def is_run(names: Collection[str]) -> bool:
    """Returns whether a folder that contains these names is the folder of a run (see `core.runs.run_folder`)."""
    return "config.yaml" in names and ("run.json" in names or {"metrics.jsonl", "checkpoints"} <= set(names))


def walk_folders(
    root: str | Path, on_skip: OnSkip, ignore: Collection[str] = (), *, enter_runs: bool = True
) -> Iterator[tuple[str, list[str]]]:
    """Yields the path of each folder from `root` down, and the sorted names of its files.

    Hidden files and folders are left out. Links to folders are followed, and each folder is listed once, whatever the
    number of links to it: a link to a parent is not followed.

    Args:
        root: The folder where the search begins.
        on_skip: Receives the folders that are left out.
        ignore: Names of folders to leave out, like hidden ones.
        enter_runs: Whether folders of runs below `root` are listed. Data that contain them grow with each run.
    """
    seen = set()

    def unreadable(error: OSError) -> None:
        on_skip(UNREADABLE, str(error.filename), (error.strerror or str(error)).lower())

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        try:
            found = identity(folder)
        except OSError as error:  # removed meanwhile
            unreadable(error)
            subfolders.clear()
            continue
        if found in seen:
            on_skip(LINKED_TWICE, folder, "")
            subfolders.clear()
            continue
        seen.add(found)
        if not enter_runs and folder != os.fspath(root) and is_run([*subfolders, *names]):
            on_skip(RUN, folder, "")
            subfolders.clear()
            continue
        kept = [name for name in subfolders if name[0] != "." and name not in ignore]
        # a folder is listed under its own name rather than that of a link next to it
        subfolders[:] = sorted(kept, key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        yield folder, sorted(name for name in names if name[0] != ".")


def distinct_files(paths: Iterable[str], on_skip: OnSkip) -> dict[str, os.stat_result]:
    """Returns the status of each file by path. Of several names of a file, one that is not a link is kept.

    Args:
        paths: Paths of files, in any order.
        on_skip: Receives the paths that are left out.
    """
    found: dict[object, tuple[str, os.stat_result]] = {}
    for path in sorted(set(paths), key=lambda path: (os.path.islink(path), path)):
        try:
            status = os.stat(path)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP
            on_skip(BROKEN_LINK if missing else UNREADABLE, path, "" if missing else (error.strerror or "").lower())
            continue
        name = identity(path, status)
        if not stat.S_ISREG(status.st_mode):
            on_skip(NOT_A_FILE, path, "")
        elif name in found:
            on_skip(LINKED_TWICE, path, "")
        else:
            found[name] = path, status
    return dict(found.values())


def link_out_of(folder: Path, suffixes: Sequence[str]) -> Path | None:
    """Returns a link in a folder, or one level below it, that leads out of it; None if there is none.

    A folder from elsewhere could make a program read, show and copy any file of the user that way. In the cache of
    huggingface_hub, the files are links to the folder `blobs` of the same model, which are allowed.

    Args:
        folder: The folder; it may be a link itself.
        suffixes: Endings of the files that are looked at. Links to folders are looked at, too.
    """
    root = os.path.realpath(folder)
    allowed = [root]
    above = os.path.dirname(root)
    if os.path.basename(above) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(above), "blobs"))
    pending = [(root, 0)]
    while pending:
        place, depth = pending.pop()
        for entry in os.scandir(place):
            is_folder = entry.is_dir()
            if entry.is_symlink() and (is_folder or entry.name.endswith(tuple(suffixes))):
                target = os.path.realpath(entry.path)
                if not any(os.path.commonpath([target, base]) == base for base in allowed):
                    return Path(entry.path)
            elif is_folder and depth == 0:
                pending.append((entry.path, 1))
    return None
