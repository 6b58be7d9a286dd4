"""Atomic writes of files, folders and links, and file locks across processes."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import is_one_line, start_python, tree

from icenet.core import files
from icenet.core.errors import FileError

HOLD_LOCK = """
    import sys, time
    from pathlib import Path
    from icenet.core.files import locked
    with locked(Path(sys.argv[1])):
        print("locked", flush=True)
        time.sleep(60)
    """


def test_a_file_is_replaced_or_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "file.txt"
    files.write_text(path, "größer")
    assert path.read_bytes() == "größer".encode()

    def refuse(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(FileError) as error:
        files.write_text(path, "new")
    assert is_one_line(error.value, str(path), "Input/output error")
    assert list(tree(tmp_path)) == ["folder/file.txt"] and path.read_bytes() == "größer".encode()


def test_an_error_leaves_no_new_folder(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for place in ("new/inner", "old/inner", "old"):
        path = tmp_path / place / "a"
        with pytest.raises(FileError, match="no space"), files.staged(path) as stage, stage.open(path) as file:
            file.write(b"1")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    with pytest.raises(ZeroDivisionError), files.staged_folder(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
        raise ZeroDivisionError
    assert tree(tmp_path) == {} and not target.exists()
    for content in ("1", "2"):
        with files.staged_folder(target) as partial:
            assert list(partial.iterdir()) == []
            (partial / content).write_text(content)
        assert [path.name for path in target.iterdir()] == [content]
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_a_file_system_that_cannot_flush_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other errors, and those of files, count."""
    flush = os.fsync

    def of_folders(code: int) -> None:
        def fsync(handle: int) -> None:
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(code, os.strerror(code))
            flush(handle)

        monkeypatch.setattr(os, "fsync", fsync)

    for code in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
        of_folders(code)
        files.write_text(tmp_path / "a" / "file.txt", str(code))
        assert (tmp_path / "a" / "file.txt").read_text() == str(code)
    of_folders(errno.EIO)
    with pytest.raises(FileError, match="Input/output error"):
        files.write_text(tmp_path / "a" / "file.txt", "new")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reserves space")
def test_space_is_reserved_or_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot reserve space is used as it is."""
    with (tmp_path / "a").open("wb") as file:
        files.reserve(file, 2**20)
        status = os.fstat(file.fileno())
        assert status.st_size == 0  # also after a crash, a file is as long as what was written
        assert status.st_blocks * 512 >= 2**20

        def refuse(number: int) -> Any:
            class Library:
                @staticmethod
                def fallocate(*arguments: object) -> int:
                    ctypes.set_errno(number)
                    return -1

            return lambda *arguments, **options: Library

        monkeypatch.setattr(ctypes, "CDLL", refuse(errno.EOPNOTSUPP))
        files.reserve(file, 2**20)
        monkeypatch.setattr(ctypes, "CDLL", refuse(errno.ENOSPC))
        files.reserve(file, 2**10)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            files.reserve(file, 2**20)


def test_a_link_is_replaced(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.replace_symlink(tmp_path / "link", Path(name))
        assert (tmp_path / "link").resolve() == tmp_path / name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "link"]


def test_a_lock_excludes_other_processes_until_they_die(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"
    assert not files.is_locked(path)
    holder = start_python(HOLD_LOCK, path)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        assert files.is_locked(path)
        with pytest.raises(TimeoutError), files.locked(path, timeout=0.1):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert not files.is_locked(path)  # the operating system released the lock of the killed process
    with files.locked(path, timeout=0):
        assert files.is_locked(path)
    assert not files.is_locked(path) and path.is_file()


def test_an_error_in_the_block_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.locked(tmp_path / "lock"):
        raise ZeroDivisionError
    assert not files.is_locked(tmp_path / "lock")


def test_hints_for_missing_paths(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("")
    assert str(tmp_path / "corpus.txt") in files.path_hint(tmp_path / "korpus.txt")
    assert str(tmp_path) in files.path_hint(tmp_path / "x")
    assert str(tmp_path / "no") in files.path_hint(tmp_path / "no" / "x")
