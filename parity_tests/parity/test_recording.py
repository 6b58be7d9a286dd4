"""Traces: a module is recorded in one process and compared in another, which lacks the framework of the first."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, is_one_line, made_once, python

pytest.importorskip("mlx")
pytest.importorskip("torch")

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn
import torch

from icenet.core.errors import DataError, FileError, UsageError
from icenet.parity import compare, read_trace, record
from icenet.parity.recordings import recording
from icenet.parity.recordings.trace_files import ARRAYS, MANIFEST

# rows of 8: the gradient of MLX's layer norm on CUDA is wrong for rows of 6
REFERENCE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x):
        return x + 0.5 * self.mlp(self.norm(x))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.25)
        self.block = Block()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.drop(self.bn(self.enter(x)).relu())
        return self.head(self.block(x.flatten(2).transpose(1, 2)).mean(1))
"""

MINE = """
import icenet.blas
import mlx.core as mx
import mlx.nn as nn

class Block(nn.Module):
    def __init__(self, eps=1e-6, scale=0.5, exact=True):
        super().__init__()
        self.norm = nn.LayerNorm(8, eps=eps)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.scale, self.exact = scale, exact

    def __call__(self, x):
        h = self.up(self.norm(x))
        return x + self.scale * self.down(nn.gelu(h) if self.exact else nn.gelu_approx(h))

class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm(8)
        self.drop = nn.Dropout(0.25)
        self.block = Block(**options)
        self.head = nn.Linear(8, 4)

    def __call__(self, x):
        x = self.drop(nn.relu(self.bn(self.enter(x))))
        return self.head(self.block(x.reshape(x.shape[0], -1, 8)).mean(1))
"""
RENAME = {"block.up": "block.mlp.0", "block.down": "block.mlp.2"}


def run(source: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "user"}
    exec(compile(source, "user.py", "exec"), names)
    return names


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a trace that was recorded in a process without MLX, from images with channels last."""
    return made_once(tmp_path_factory, "recorded", record_trace) / "trace"


def record_trace(folder: Path) -> None:
    (folder / "ref.py").write_text(REFERENCE)
    np.savez(folder / "x.npz", np.random.default_rng(0).standard_normal((2, 5, 4, 3)).astype(np.float32))
    program = """
import sys
from icenet.cli.main import main
from icenet.parity.recordings import recording
recording.SAMPLES = 2
folder = sys.argv[1]
main(["parity", "record", f"{folder}/ref.py:Net", "--input", f"{folder}/x.npz", "--out", f"{folder}/trace"])
"""
    output = python(program, str(folder), blocked=["mlx"])
    assert "icenet parity check" in output
    assert {path.name for path in (folder / "trace").iterdir()} == {ARRAYS, MANIFEST}


def judged(trace: Path, options: dict[str, Any] | None = None, **more: Any) -> Any:
    return compare(run(MINE)["Net"](**(options or {})), read_trace(trace), rename=RENAME, copy_weights=True, **more)


def test_a_correct_port_passes_all_stages(trace: Path) -> None:
    report = judged(trace)
    assert report.passed, str(report)
    assert [stage.status for stage in report.stages] == ["passed"] * 7
    assert report.environment["reference"]["dtype"] == "fp64" and len(report.losses["a"]) == 3


@pytest.mark.parametrize(
    ("options", "culprit", "words"),
    [
        ({"eps": 1e-2}, "block.norm", "eps is 0.01 in a, 1e-06 in b"),
        ({"scale": 0.25}, "block", "after mlp.2"),
        ({"exact": False}, "block", "between mlp.0 and mlp.2"),
    ],
    ids=str,
)
def test_a_difference_is_found_at_its_own_module(
    trace: Path, options: dict[str, Any], culprit: str, words: str
) -> None:
    report = judged(trace, options)
    assert report.culprit == culprit and words in report.verdict, str(report)


WITHIN = """
import torch
from torch import nn

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)

class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.inner = nn.GELU(), Inner()

    def forward(self, x):
        return x + self.inner(self.act(x))
"""
MINE_WITHIN = """
import icenet.blas
import mlx.nn as nn

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def __call__(self, x):
        return 1.1 * (x @ self.linear.weight.T + self.linear.bias)

class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def __call__(self, x):
        return x + self.inner(nn.gelu(x))
"""


def test_a_module_whose_layers_are_functions_here_is_the_culprit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the calls in the trace, the other side has those of `Inner` alone, which are left out of its parent."""
    monkeypatch.setattr(recording, "SAMPLES", 1)
    record(run(WITHIN)["Outer"](), np.ones((2, 4), np.float32), tmp_path / "trace", steps=1)
    report = compare(run(MINE_WITHIN)["Outer"](), read_trace(tmp_path / "trace"), copy_weights=True)
    assert report.culprit == "inner", str(report)


def test_the_trace_says_what_the_module_itself_says(trace: Path) -> None:
    images = np.load(trace.parent / "x.npz")["arr_0"]
    for options in ({}, {"scale": 0.25}):
        theirs = run(REFERENCE)["Net"]()
        live = compare(run(MINE)["Net"](**options), theirs, images, rename=RENAME, copy_weights=True)
        assert (live.culprit, live.where) == ((report := judged(trace, options)).culprit, report.where)
        rows = [[(row.name, row.shape) for row in stage.rows] for stage in live.stages]
        assert rows == [[(row.name, row.shape) for row in stage.rows] for stage in report.stages]


def test_a_check_needs_no_pytorch(trace: Path) -> None:
    (trace.parent / "mine.py").write_text(MINE)
    program = """
import sys
from icenet.cli.main import main
folder = sys.argv[1]
renames = [part for pair in ("block.up=block.mlp.0", "block.down=block.mlp.2") for part in ("--rename", pair)]
main(["parity", "check", f"{folder}/mine.py:Net", f"{folder}/trace", "--copy-weights", *renames,
      "--html", f"{folder}/page.html"])
"""
    output = python(program, str(trace.parent), blocked=["torch"])
    assert output.startswith("passed: ") and (trace.parent / "page.html").stat().st_size > 10_000


def test_two_modules_of_pytorch(trace: Path) -> None:
    report = compare(run(REFERENCE)["Net"](), read_trace(trace))
    assert report.passed, str(report)
    images = np.load(trace.parent / "x.npz")["arr_0"].transpose(0, 3, 1, 2)
    assert compare(run(REFERENCE)["Net"](), run(REFERENCE)["Net"](), images).passed
    changed = run(REFERENCE)["Net"]()
    changed.bn.momentum = 0.3
    assert compare(changed, read_trace(trace)).culprit == "bn"


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu()


class Mine(mlx.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = mlx.nn.Linear(4, 3)

    def __call__(self, x: mx.array) -> mx.array:
        return mlx.nn.relu(self.layer(x))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(tmp_path: Path, dtype: str) -> None:
    record(Linear(), None, tmp_path / "trace", dtype=dtype)
    assert compare(Mine(), read_trace(tmp_path / "trace"), copy_weights=True, dtype=dtype).passed
    with pytest.raises(UsageError, match=f"dtype='{dtype}'"):
        compare(Mine(), read_trace(tmp_path / "trace"))


def test_mlx_is_recorded_for_mlx(tmp_path: Path) -> None:
    module = Mine()
    record(module, np.ones((2, 4), np.float32), tmp_path / "trace")
    assert compare(module, read_trace(tmp_path / "trace")).passed
    with pytest.raises(UsageError) as error:
        compare(Linear(), read_trace(tmp_path / "trace"))
    assert is_one_line(error.value, "float64", "record")


def test_a_loss_of_the_user(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    record(Linear(), x, tmp_path / "trace", loss=lambda y: y.square().sum())
    trace = read_trace(tmp_path / "trace")
    assert compare(Mine(), trace, copy_weights=True, loss=(lambda y: mx.square(y).sum(), None)).passed
    wrong = compare(Mine(), trace, copy_weights=True, loss=(lambda y: mx.square(y).mean(), None))
    assert wrong.failed_stage.name == "loss"
    with pytest.raises(UsageError, match="loss="):
        compare(Mine(), trace)


def test_values_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file grows with every call of a module, and the arrays of a run are not held in memory."""
    sizes = []

    class Growing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
                if recorder:
                    recorder[-1]._file.flush()
                    sizes.append((tmp_path / "trace" / ARRAYS).stat().st_size)
            return x

    recorder: list[Any] = []

    class Spy(recording.TraceStore):
        def __init__(self, writer: Any) -> None:
            super().__init__(writer)
            recorder.append(writer)

    monkeypatch.setattr(recording, "TraceStore", Spy)
    monkeypatch.setattr(recording, "SAMPLES", 1)
    record(Growing(), np.ones((8, 64), np.float32), tmp_path / "trace")
    fresh = np.diff(sizes[4:8])
    assert all(size >= 8 * 64 * 8 for size in fresh), sizes  # an output in float64 for each layer


# ---- traces that cannot be read -----------------------------------------------------------------------------


def change(key: str, value: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest[key] = value
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return apply


def change_array(part: int, value: Any) -> Callable[[Path], None]:
    """Changes the offset, the dtype or the shape of one array."""

    def apply(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["arrays"][0][part] = value
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return apply


def cut(folder: Path) -> None:
    data = (folder / ARRAYS).read_bytes()
    (folder / ARRAYS).write_bytes(data[:-64])


def outside(folder: Path) -> None:
    shutil.move(folder / ARRAYS, folder.parent / "elsewhere")
    (folder / ARRAYS).symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text('{"icenet_trace": 1, "arr'),
        lambda folder: (folder / MANIFEST).write_text("[" * 100_000),
        lambda folder: (folder / MANIFEST).write_bytes(b"\x80\x04\x95"),
        lambda folder: (folder / ARRAYS).unlink(),
        cut,
        outside,
        change("icenet_trace", 99),
        change_array(2, [10**12]),
        change_array(2, [10**30]),
        change_array(2, [1] * 33),
        change_array(0, 10**12),
        change_array(0, -8),
        change_array(1, "|O"),
        change_array(1, "|S4"),
        change("runs", {}),
        change("modules", [{"path": ""}]),
        change("weights", {"head.weight": 10**9}),
        change("inputs", {"given": {"call": "os.system"}, "values": [], "axes": []}),
        change("backend", "../../evil"),
    ],
)
def test_a_damaged_trace_is_one_line(trace: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = tmp_path / "trace"
    shutil.copytree(trace, folder)
    damage(folder)
    with pytest.raises(DataError) as error:
        read_trace(folder)
    assert is_one_line(error.value, str(folder))


def test_no_array_is_pickled() -> None:
    for path in (ROOT / "icenet/parity/recordings").glob("*.py"):
        source = path.read_text()
        assert not re.search(r"\bpickle\.|allow_pickle=True|\beval\(|\bexec\(", source)


@pytest.mark.parametrize("is_new", [True, False])
def test_an_interrupt_leaves_nothing(tmp_path: Path, is_new: bool) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    folder = tmp_path / "trace"
    if not is_new:
        folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        record(Linear(), np.ones((2, 4), np.float32), folder, progress=interrupt)
    assert not list(folder.iterdir()) if folder.exists() else is_new


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device of a full disk is that of Linux")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    folder.mkdir()
    (folder / ARRAYS).symlink_to("/dev/full")
    with pytest.raises(FileError) as error:
        record(Linear(), np.ones((2, 4), np.float32), folder)
    assert is_one_line(error.value, "no space to write it", ARRAYS) and not list(folder.iterdir())


def test_the_progress_of_a_recording_and_of_a_check(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    x = np.ones((2, 4), np.float32)
    trace = record(Linear(), x, tmp_path / "trace", progress=lambda *what: told.append(what))
    assert {"run in training mode", "training steps"} <= {stage for stage, _, _ in told}
    told.clear()
    compare(Linear(), read_trace(trace), copy_weights=True, progress=lambda *what: told.append(what))
    assert {"structure", "modules", "training"} <= {stage for stage, _, _ in told}
    assert all(0 <= done < total for _, done, total in told)


def test_recording_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    x = np.ones((2, 4), np.float32)
    for folder, inputs, words in (
        ("full", x, "thesis.txt"),
        ("new", np.ones((2, 5), np.float32), "layer"),
        ("other", (x, object()), "argument"),
    ):
        with pytest.raises(UsageError) as error:
            record(Linear(), inputs, tmp_path / folder)
        assert is_one_line(error.value, words)
    options: list[dict[str, Any]] = [{"steps": 1.5}, {"seed": "0"}, {"dtype": "half"}, {"loss": 3}]
    for wrong in options:
        with pytest.raises(UsageError) as error:
            record(Linear(), x, tmp_path / "wrong", **wrong)
        assert is_one_line(error.value, f"record: {next(iter(wrong))} is") and not (tmp_path / "wrong").exists()
    assert not (tmp_path / "new").exists()
    with pytest.raises(UsageError, match="inputs"):
        compare(Mine(), read_trace(record(Linear(), x, tmp_path / "new")), x)
