"""What a comparison holds in memory and in temporary files."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import icenet.blas

import mlx.nn as M
import numpy as np
import pytest
import torch.nn as T
from pairs import draw

import icenet
from icenet.core.errors import FileError
from icenet.parity import Report, compare
from icenet.parity.calls import array_files
from icenet.parity.calls.array_files import ArrayFiles
from icenet.parity.calls.events import Store


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, in which a comparison writes all arrays."""
    monkeypatch.setattr(Store.__init__, "__defaults__", (0,))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the arrays that are written."""
    found: list[int] = []
    append = ArrayFiles._append

    def spy(self: ArrayFiles, data: memoryview) -> int:
        found.append(data.nbytes)
        return append(self, data)

    monkeypatch.setattr(ArrayFiles, "_append", spy)
    return found


def linears() -> tuple[Any, Any]:
    theirs = T.Sequential(*(T.Linear(3, 3) for _ in range(3)))
    return icenet.from_torch(theirs, M.Sequential(*(M.Linear(3, 3) for _ in range(3)))), theirs


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def array_files_open() -> int:
    """Returns the number of open files without a name, as those of arrays. Those of a GPU's driver have one."""
    found = 0
    for number in map(int, os.listdir("/dev/fd")):
        with contextlib.suppress(OSError):  # that of the folder itself
            status = os.fstat(number)
            found += stat.S_ISREG(status.st_mode) and status.st_nlink == 0
    return found


def results(report: Report) -> list[Any]:
    return [(row.path, row.part, row.status, row.ratio, row.noise) for _, row in report.rows()]


class Pass(M.Module):
    def __call__(self, x: Any) -> Any:
        return x


def test_an_array_that_modules_pass_on_is_written_once(folder: Path, written: list[int]) -> None:
    """It is an argument and an output of four calls on each side, in fp32 on two of them and in float64."""
    x = draw(4, 3)
    report = compare(
        M.Sequential(Pass(), Pass(), Pass()), T.Sequential(*(T.Identity() for _ in range(3))), x, stages=["forward"]
    )
    assert report.passed, str(report)
    assert Counter(written) == {x.nbytes: 1, 2 * x.nbytes: 1}


def test_files_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, x = linears(), draw(4, 3)
    expected = compare(*pair, x)
    monkeypatch.setattr(Store.__init__, "__defaults__", (0,))
    assert results(compare(*pair, x)) == results(expected)


@pytest.mark.parametrize("error", [None, ValueError("no"), KeyboardInterrupt()], ids=["passes", "error", "Ctrl-C"])
def test_nothing_stays_after_a_comparison(folder: Path, written: list[int], error: BaseException | None) -> None:
    ours, theirs = linears()

    class Stops(M.Module):
        def __call__(self, x: Any) -> Any:
            if error is not None:
                raise error
            return x

    ours.layers.append(Stops())
    theirs.append(T.Identity())
    before = descriptors()
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            compare(ours, theirs, draw(4, 3))
    else:
        assert compare(ours, theirs, draw(4, 3)).passed == (error is None)
    assert written
    assert not list(folder.iterdir())
    assert descriptors() <= before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_leaves_no_files(tmp_path: Path, number: signal.Signals) -> None:
    script = "import array_files as f, numpy, os; x = f.ArrayFiles().write(numpy.ones(9)); os.kill(os.getpid(), %d)"
    place = {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(array_files.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", script % number], env={**os.environ, **place}, check=False)
    assert done.returncode == -number
    assert not list(tmp_path.iterdir())


def test_the_arrays_of_a_draw_are_deleted_before_the_next(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_files, "FILE_SIZE", 1)  # a file for each array

    def open_files(draws: int) -> int:
        found = [0]
        before = array_files_open()
        report = compare(*linears(), draws=draws, progress=lambda *_: found.append(array_files_open() - before))
        assert report.passed
        return max(found)

    assert 3 < open_files(3) <= open_files(1) + 1


def test_many_arrays_need_few_descriptors() -> None:
    before, files = descriptors(), ArrayFiles()
    kept = [files.write(np.full(3, float(number))) for number in range(2000)]
    assert descriptors() <= before + 3
    assert all((array == number).all() for number, array in enumerate(kept))
    files.close()
    assert (kept[0] == 0).all()
    del kept
    assert descriptors() <= before


@pytest.mark.parametrize(
    "array",
    [
        np.float64(2.5).reshape(()),
        np.arange(24, dtype=np.int32).reshape(2, 3, 4).T,
        np.arange(24, dtype=np.float16).reshape(2, 3, 4)[:, ::2],
        np.array([[True, False]]),
        np.array([1 + 2j, np.nan], np.complex64),
    ],
    ids=["scalar", "columns", "parts", "bool", "complex"],
)
def test_arrays_are_read_as_they_were_written(array: np.ndarray) -> None:
    found = ArrayFiles().write(array)
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert found.flags.fnc == array.flags.fnc


def test_a_full_disk_is_one_line_and_no_difference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays are written while the modules are called, whose own errors are a result of the comparison."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ArrayFiles, "_append", full)
    with pytest.raises(FileError, match=r"no space left.*TMPDIR") as caught:
        compare(*linears(), draw(4, 3))
    assert "\n" not in str(caught.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["one mode", "two modes"])
def test_too_little_space_is_an_error_after_the_first_run(
    folder: Path, written: list[int], monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    theirs = T.Sequential(T.Linear(64, 64), T.Dropout(dropout), T.Linear(64, 64))
    ours = icenet.from_torch(theirs, M.Sequential(M.Linear(64, 64), M.Dropout(dropout), M.Linear(64, 64)))
    x = draw(1000, 64)
    stages = ["forward", "gradients"]
    assert compare(ours, theirs, x, stages=stages).passed
    needed = sum(written)
    written.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed / 3))
    with pytest.raises(FileError, match=r"needs 0\.00\d+ GB more for its arrays, 0\.00\d+ are free; set TMPDIR"):
        compare(ours, theirs, x, stages=stages)
    # without dropout the first run, in float64, is two thirds: the bits of both others are equal and written once
    assert 0 < sum(written) < 0.7 * needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    assert compare(ours, theirs, x, stages=stages).passed
