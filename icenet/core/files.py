"""New files take the place of old ones only when they are complete and on the disk."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from icenet.core.errors import WeightsError


class Stage:
    """New files, written beside their destinations under temporary names. See `staged`."""

    def __init__(self) -> None:
        self.files: list[tuple[Path, Path]] = []

    @contextlib.contextmanager
    def open(self, path: Path) -> Iterator[BinaryIO]:
        """A file to write that will become `path`."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        self.files.append((temporary, path))
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def staged(destination: Path, absent_meanwhile: Path | None = None) -> Iterator[Stage]:
    """Writes several files as one act: all are complete and on disk before the first takes its place.

    On any error the temporary files go and what was there stays. An OSError (a full disk, no permission)
    becomes a WeightsError of one line about `destination`. Each rename is atomic, several are not:
    `absent_meanwhile` is a file removed before the first and written last, without which the others are not
    read.
    """
    stage = Stage()
    replacing = False
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        yield stage
        replacing = len(stage.files) > 1
        if absent_meanwhile is not None:
            absent_meanwhile.unlink(missing_ok=True)
        for temporary, path in stage.files:
            os.replace(temporary, path)
        sync_folder(destination.parent)
    except OSError as error:
        left = "the files there are incomplete now: write them again" if replacing else "nothing there was changed"
        raise WeightsError(f"{destination}: {reason_of(destination, error)}; {left}") from error
    finally:
        for temporary, _ in stage.files:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small file, or leaves what was there."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, or leaves what was there."""
    with staged(path) as stage, stage.open(path) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def reason_of(path: Path, error: OSError) -> str:
    """Why a path could not be written, and what to do about it."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot be written ({error.strerror}); check the folder and its permissions"
    room = ""
    with contextlib.suppress(OSError):
        if error.errno == errno.ENOSPC:  # the others are limits of a user or a file
            room = f" ({shutil.disk_usage(path.parent).free:,} bytes left)"
    return f"no space to write it{room}; free some or choose another disk"


def nearby(path: Path) -> str:
    """A hint for a path that is not there: its nearest neighbour, or the part of it that is there."""
    parent = path.parent
    try:
        if not parent.is_dir():
            return f"; the folder {str(parent)!r} is not there either"
        names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, 1, cutoff=0.5)
    if close:
        return f"; did you mean {str(parent / close[0])!r}?"
    return f" (looked in {str(parent.resolve())!r})"
