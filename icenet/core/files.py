"""Atomic writes and file locks.

A file is written under a temporary name in the folder of its destination, flushed to the disk (fsync) and renamed.
A reader therefore finds the old file or the new one, never a part of it, even after a crash.

    write_bytes, write_text     one small file
    staged                      one or more files of any size
    staged_folder               a whole folder, complete or absent, such as a checkpoint
    replace_symlink             a symbolic link
    locked, is_locked           one process at a time
"""

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

import filelock

from icenet.core.errors import FileError

# --- atomic writes ------------------------------------------------------------------------------------------


def _temporary(path: Path) -> Path:
    """Returns a hidden name in the same folder, because only renames within a file system are atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


class Stage:
    """The temporary files of one call of `staged`."""

    def __init__(self) -> None:
        self.files: list[tuple[Path, Path]] = []  # (temporary, destination)

    @contextlib.contextmanager
    def open(self, path: Path) -> Iterator[BinaryIO]:
        """Opens a temporary file that replaces `path` when `staged` ends."""
        temporary = _temporary(path)
        self.files.append((temporary, path))
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def staged(destination: Path, absent_meanwhile: Path | None = None) -> Iterator[Stage]:
    """Writes files under temporary names and renames them when all are complete and on the disk.

    On an error the temporary files are removed and the existing files stay.

    Args:
        destination: The path that error messages name. Its folder is created if absent.
        absent_meanwhile: A file without which readers ignore the others, such as an index. It is removed before the
            first rename and must be the last that is written. Several renames are not atomic, and without this a
            crash between them could leave a mixture of old and new files.

    Raises:
        FileError: A file cannot be written, for example because the disk is full.
    """
    stage = Stage()
    renaming = False
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        yield stage
        renaming = len(stage.files) > 1
        if absent_meanwhile is not None:
            absent_meanwhile.unlink(missing_ok=True)
        for temporary, path in stage.files:
            os.replace(temporary, path)
        _sync(destination.parent)
    except OSError as error:
        state = "the files there are incomplete: write them again" if renaming else "the existing files are unchanged"
        raise FileError(f"{destination}: {write_error(destination, error)}; {state}") from error
    finally:
        for temporary, _ in stage.files:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) atomically. Raises FileError if it cannot be written."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically. Raises FileError if it cannot be written."""
    with staged(path) as stage, stage.open(path) as file:
        file.write(content)


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Creates the folder `target` completely or not at all.

    Yields an empty folder, `.NAME.partial` next to the target. The caller fills it with the functions above, which
    flush each file to the disk. At the end of the block the folder is renamed to `target`, which it replaces. On an
    error it is removed. A killed process leaves it behind; it is removed when the same target is written again.

    Raises:
        OSError: A file or a folder cannot be written.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        _sync(partial)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_symlink(link: Path, target: Path) -> None:
    """Points the symbolic link `link` to the folder `target`, given relative to the link's folder.

    Raises:
        OSError: The link cannot be written, or the file system has no symbolic links.
    """
    temporary = _temporary(link)
    try:
        temporary.symlink_to(target, target_is_directory=True)
        os.replace(temporary, link)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # only POSIX systems can open a folder
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_error(path: Path, error: OSError) -> str:
    """Returns the reason why `path` cannot be written, and a remedy."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot be written ({error.strerror}); check the folder and its permissions"
    free = ""
    with contextlib.suppress(OSError):
        if error.errno == errno.ENOSPC:  # the other two are limits of a user and of a file
            free = f" ({shutil.disk_usage(path.parent).free:,} bytes left)"
    return f"no space to write it{free}; free some or choose another disk"


# --- locks --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Holds an exclusive lock during the block.

    The operating system releases the lock when the process ends, even if it is killed. The lock file stays. On
    Linux and macOS this is `flock`: on a network file system it may hold among the processes of one host only, and
    a file system without it (Lustre mounted without `flock`) gets no lock or a marker file, depending on filelock's
    version.

    Args:
        path: The lock file, created with its folder if absent.
        timeout: Seconds to wait for another process; -1 waits without limit.

    Raises:
        TimeoutError: Another process holds the lock.
        OSError: The lock file cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except NotImplementedError:  # the file system has no locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Returns whether a process holds the lock of `path`; False if that cannot be determined.

    Does not use filelock, which opens the file for writing and takes an exclusive lock. This also works in a folder
    without write permission, and several processes can check at once.
    """
    try:
        import fcntl

        handle = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):  # Windows; no lock file
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # the file system has no locks
        return False
    finally:
        os.close(handle)


# --- hints --------------------------------------------------------------------------------------------------


def path_hint(path: Path) -> str:
    """Returns a hint for the message about a missing path: a similar name, or the folder that was searched."""
    parent = path.parent
    try:
        if not parent.is_dir():
            return f"; the folder {str(parent)!r} does not exist either"
        names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, 1, cutoff=0.5)
    if close:
        return f"; did you mean {str(parent / close[0])!r}?"
    return f" (looked in {str(parent.resolve())!r})"
