"""Atomic writes, files that a user names, and file locks.

A file is written under a temporary name in the folder of its destination, flushed to the disk (fsync) and renamed.
A reader therefore finds the old file or the new one, never a part of it, even after a crash. Large files that can be
made again are not flushed: a power failure within about half a minute can leave them incomplete.

    write_bytes, write_text     one small file
    staged                      one or more files of any size
    staged_folder               a whole folder, complete or absent, such as a checkpoint
    replace_symlink             a symbolic link (`no_symlinks` says whether there are any)
    output_file                 checks a path that a user named as output
    set_aside                   renames a file that is to be kept
    locked, is_locked           one process at a time
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from icenet.core.errors import FileError, UsageError

# --- atomic writes ------------------------------------------------------------------------------------------


def _temporary(path: Path) -> Path:
    """Returns a hidden name in the same folder, because only renames within a file system are atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


class Stage:
    """The temporary files of one call of `staged`."""

    def __init__(self, durable: bool) -> None:
        self.durable = durable
        self.files: list[tuple[Path, Path]] = []  # (temporary, destination)

    @contextlib.contextmanager
    def open(self, path: Path) -> Iterator[BinaryIO]:
        """Opens a temporary file that replaces `path` when `staged` ends."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        self.files.append((temporary, path))
        with temporary.open("xb") as file:
            yield file
            file.flush()
            if self.durable:
                os.fsync(file.fileno())


@contextlib.contextmanager
def staged(destination: Path, absent_meanwhile: Iterable[Path] = (), *, durable: bool = True) -> Iterator[Stage]:
    """Writes files under temporary names and renames them when all are complete and, if `durable`, on the disk.

    On an error the temporary files and the new folders are removed, and the existing files stay.

    Args:
        destination: The path that error messages name. Its folder is created if absent.
        absent_meanwhile: Files without which readers ignore the others, such as an index. They are removed before the
            first rename and must be the last that are written. Several renames are not atomic, and without this a
            crash between them could leave a mixture of old and new files.
        durable: Whether to wait until the disk has the files, which takes as long again as writing them. False is
            for what can be made again from files that stay, such as converted weights.

    Raises:
        FileError: A file cannot be written, for example because the disk is full.
    """
    stage = Stage(durable)
    renaming = False
    absent = [folder for folder in destination.parents if not folder.exists()]
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        yield stage
        renaming = len(stage.files) > 1
        for path in absent_meanwhile:
            path.unlink(missing_ok=True)
        for temporary, path in stage.files:
            os.replace(temporary, path)
        absent.clear()
        if durable:
            _sync(destination.parent)
    except OSError as error:
        state = "the files there are incomplete: write them again" if renaming else "the existing files are unchanged"
        raise FileError(f"{destination}: {write_error(destination, error)}; {state}") from error
    finally:
        for temporary, _ in stage.files:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        for folder in absent:  # the innermost one first
            with contextlib.suppress(OSError):
                folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) atomically. Raises FileError if it cannot be written."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically. Raises FileError if it cannot be written."""
    with staged(path) as stage, stage.open(path) as file:
        file.write(content)


def reserve(file: BinaryIO, size: int) -> None:
    """Reserves the space of a new file on the disk. Writing it then takes a quarter less processor time on ext4.

    Does nothing where the system cannot do it. `os.posix_fallocate` would write each block there.

    Raises:
        OSError: The disk has too little space.
    """
    if sys.platform != "linux" or size < _LEAST_RESERVED:
        return
    library = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if fallocate is None:
        return
    keeps_size = 1
    offset, length = ctypes.c_int64(0), ctypes.c_int64(size)
    if fallocate(file.fileno(), keeps_size, offset, length) and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


_LEAST_RESERVED = 1 << 20


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


def no_symlinks(folder: Path) -> str:
    """Returns why no symbolic link can be created in a folder; empty if one can."""
    temporary = _temporary(folder / "link")
    try:
        temporary.symlink_to(folder.name, target_is_directory=True)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return ""


def _sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":
        return  # only POSIX systems can open a folder
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        # some network file systems cannot flush a folder (CIFS, FUSE): they write its names at once
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


def write_error(path: Path, error: OSError) -> str:
    """Returns the reason why `path` cannot be written, and a remedy."""
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        blocking = next((parent for parent in path.parents if parent.exists()), path)
        if not blocking.is_dir():
            return f"cannot be written, because {blocking} is not a folder; choose another place"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot be written ({error.strerror}); check the folder and its permissions"
    free = ""
    with contextlib.suppress(OSError):
        if error.errno == errno.ENOSPC:  # the other two are limits of a user and of a file
            free = f" ({shutil.disk_usage(path.parent).free:,} bytes left)"
    return f"no space to write it{free}; free some or choose another disk"


def cache_folder() -> Path:
    """Returns $ICENET_CACHE, or ~/.cache/icenet."""
    chosen = os.environ.get("ICENET_CACHE")
    return Path(chosen).expanduser() if chosen else Path(os.path.expanduser("~"), ".cache", "icenet")


# --- files that a user names --------------------------------------------------------------------------------


def output_file(
    path: Path,
    *,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    is_earlier_output: Callable[[Path], bool] | None = None,
) -> Path:
    """Checks that a path which the user named as output may be written.

    Args:
        path: The path.
        overwrite: Whether an existing file may be replaced.
        inputs: Files that are read. They are never replaced.
        is_earlier_output: Returns whether an existing file is an earlier output of the same kind, which may be
            replaced without `overwrite`. None: no file is.

    Returns:
        The file to write: the target of a symbolic link, otherwise `path`.

    Raises:
        UsageError: There is a file that may not be replaced, a folder, or something else.
    """
    try:
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        status = target.stat()
    except (FileNotFoundError, NotADirectoryError):
        return target
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be written ({reason}); choose another name") from None
    if stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{path}: is a folder; name a file")
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path}: is not a regular file; choose another name")
    if any(other.exists() and os.path.samefile(target, other) for other in inputs):
        raise UsageError(f"{path}: is the same file as an input; choose another name")
    if not overwrite and not (is_earlier_output is not None and is_earlier_output(target)):
        raise UsageError(
            f"{path}: exists; choose another name, or replace it with --overwrite (in Python overwrite=True)"
        )
    if not status.st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
        # a rename would replace it, because it needs the permission of the folder only
        raise UsageError(f"{path}: is write-protected; choose another name, or chmod u+w {path}")
    return target


def check_folder(folder: Path) -> None:
    """Checks that files can be written to a folder, which need not exist, before the work whose result it gets.

    Raises:
        UsageError: It is a file.
        FileError: It cannot be written.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UsageError(f"{existing}: is not a folder; choose another one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise FileError(f"{existing}: cannot be written; check its permissions, or choose another folder")


def set_aside(path: Path) -> Path:
    """Renames a file or folder to NAME-replaced, or NAME-replaced-2 if that exists. Returns the new path.

    Raises:
        OSError: It cannot be renamed.
    """
    number, target = 1, path.with_name(f"{path.stem}-replaced{path.suffix}")
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{path.stem}-replaced-{number}{path.suffix}")
    os.rename(path, target)
    return target


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
    import filelock  # most commands hold no lock, and it takes 0.02 s

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


LFS_POINTER = b"version https://git-lfs"
"""Beginning of the short text that Git LFS leaves in place of a file that was not downloaded."""
LFS_REMEDY = "run `git lfs pull` in its repository"


def user_path(value: object, name: str) -> Path:
    """Returns a path that a program gave as text or a path, with `~` for the home folder, as a shell replaces it.

    Args:
        value: The path.
        name: Beginning of the message.

    Raises:
        UsageError: It is neither text nor a path, or it is empty.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise UsageError(f"{name}: a path must be text or a pathlib.Path, not {type(value).__name__}")
    if not os.fspath(value).strip():
        raise UsageError(f"{name}: the path is empty; name a file or folder")
    return Path(os.path.expanduser(value))


def path_hint(path: Path) -> str:
    """Returns a hint for the message about a missing path: a similar name, or the folder that was searched."""
    parent = path.parent
    try:
        if path.is_symlink():
            return f": it is a link to {os.readlink(path)!r}, which leads to nothing"
        if not parent.is_dir():
            return f"; the folder {str(parent)!r} does not exist either"
        names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, 1, cutoff=0.5)
    if close:
        return f"; did you mean {str(parent / close[0])!r}?"
    return f" (looked in {str(parent.resolve())!r})"
