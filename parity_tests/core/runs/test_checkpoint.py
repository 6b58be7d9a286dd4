"""Checkpoints: complete or absent, verified, and a run continues from the newest intact one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from helpers import BACKENDS, environment, icenet, is_one_line, losses, same_bits, tiny, tree, write_text

import icenet as front_door
from icenet.cli.main import main
from icenet.core.config import Config
from icenet.core.errors import CheckpointError, IceNetError
from icenet.core.runs import checkpoint
from icenet.core.runs.early_stopping import EarlyStopping
from icenet.core.training.trainer import Trainer
from icenet.core.weights import files as weights

pytest.importorskip("mlx")

Arrays = dict[str, np.ndarray]


def arrays(seed: int) -> Arrays:
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal((3, 5)).astype(np.float32) for name in ("a.weight", "b.0.bias")}


pytestmark = pytest.mark.usefixtures("no_plots")

STATE = {"loss_scale": {"scale": 1.0, "good_steps": 0}, "data": "x"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of the steps 1, 2 and 3; the weights of step n are arrays(n)."""
    folder = tmp_path / "run"
    for step in (1, 2, 3):
        checkpoint.save(folder, tiny(tmp_path), step, arrays(step), arrays(-step + 100), STATE)
    return folder


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def test_there_and_back(run: Path, tmp_path: Path) -> None:
    found = checkpoint.find(run)
    assert found.step == 3 and found.path == step_folder(run, 3) and found.config == tiny(tmp_path)
    assert same_bits(found.weights, arrays(3)) and same_bits(found.optimizer, arrays(97))
    assert found.state == {"format": 1, "step": 3, **STATE}
    assert checkpoint.find(step_folder(run, 1)).step == 1
    torch = pytest.importorskip("torch")
    loaded = pytest.importorskip("safetensors.torch").load_file(step_folder(run, 3) / "model.safetensors")
    assert torch.equal(loaded["a.weight"], torch.from_numpy(arrays(3)["a.weight"]))


def test_a_path_within_a_run_is_answered_with_the_folder_to_give(run: Path) -> None:
    newest = step_folder(run, 3)
    for path, folder in ((newest.parent, run), (newest / "model.safetensors", newest)):
        with pytest.raises(CheckpointError) as error:
            checkpoint.find(path)
        assert is_one_line(error.value, f"{path}: ", f"give its folder, {folder}")


def test_the_manifest_is_of_the_files(run: Path) -> None:
    files = tree(step_folder(run, 2))
    manifest = json.loads((step_folder(run, 2) / "manifest.json").read_text())
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} | {
        "manifest.json": files["manifest.json"]
    } == files


def test_keep(run: Path, tmp_path: Path) -> None:
    checkpoint.save(run, tiny(tmp_path), 4, arrays(4), arrays(0), STATE, keep=2)
    assert checkpoint.list_checkpoints(run) == [step_folder(run, 3), step_folder(run, 4)]
    assert checkpoint.list_checkpoints(run, after=3) == [step_folder(run, 4)]


def test_many_steps_are_in_order(tmp_path: Path) -> None:
    """Names grow a digit beyond 99,999,999 steps: the order is that of numbers."""
    for step in (99_999_999, 100_000_000):
        checkpoint.save(tmp_path, tiny(tmp_path), step, arrays(1), arrays(2), STATE)
    assert checkpoint.find(tmp_path).step == 100_000_000


def test_weights_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 5 GB is written in shards with an index (here: more than 70 bytes)."""
    monkeypatch.setattr(weights, "write", partial(weights.write, max_shard_bytes=70))
    path = checkpoint.save(tmp_path, tiny(tmp_path), 1, arrays(1), arrays(2), STATE)
    assert (path / "model.safetensors.index.json").is_file()
    found = checkpoint.find(tmp_path)
    assert same_bits(found.weights, arrays(1)) and same_bits(found.optimizer, arrays(2))
    shard = next(path.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"model-00002.*damaged"):
        checkpoint.find(tmp_path)


# ---- damage -----------------------------------------------------------------------------------------------


def flip(path: Path, name: str, at: int = -3) -> None:
    data = bytearray((path / name).read_bytes())
    data[at] ^= 1
    (path / name).write_bytes(data)


def cut(path: Path, name: str) -> None:
    os.truncate(path / name, (path / name).stat().st_size // 2)


def signed(path: Path, name: str, text: str) -> None:
    """Another text in a file, with a manifest that vouches for it."""
    (path / name).write_text(text, encoding="utf-8")
    manifest = json.loads((path / "manifest.json").read_text())
    entry = {"bytes": (path / name).stat().st_size, "sha256": weights.checksum(path / name)}
    manifest["files"][name] = entry
    (path / "manifest.json").write_text(json.dumps(manifest))


def change_manifest(path: Path, change: Callable[[Any], Any]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(change(manifest)))


def listing(manifest: Any, name: str, entry: Any) -> Any:
    return {**manifest, "files": {**manifest["files"], name: entry}}


OUTSIDE = {"bytes": 2, "sha256": "0" * 64}

# name: (what happens to a checkpoint, the file or the value that the message names)
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights cut short": (lambda p: cut(p, "model.safetensors"), "model.safetensors: damaged"),
    "one bit of the weights": (lambda p: flip(p, "model.safetensors"), "model.safetensors: damaged"),
    "one bit of the optimizer": (lambda p: flip(p, "optimizer.safetensors"), "optimizer.safetensors: damaged"),
    "one bit of the state": (lambda p: flip(p, "state.json", 20), "state.json: damaged"),
    "weights empty": (lambda p: (p / "model.safetensors").write_bytes(b""), "model.safetensors: damaged"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors: missing"),
    "no optimizer": (lambda p: (p / "optimizer.safetensors").unlink(), "optimizer.safetensors: missing"),
    "no state": (lambda p: (p / "state.json").unlink(), "state.json: missing"),
    "no config": (lambda p: (p / "config.yaml").unlink(), "config.yaml: missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest cut short": (lambda p: cut(p, "manifest.json"), "manifest.json: damaged"),
    "manifest of bytes": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json: damaged"),
    "manifest a list": (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json: damaged"),
    "manifest too deep": (lambda p: (p / "manifest.json").write_text("[" * 100_000), "manifest.json: damaged"),
    "manifest without files": (
        lambda p: change_manifest(p, lambda m: {**m, "files": {}}), "manifest.json: damaged"),
    "manifest without the optimizer": (
        lambda p: change_manifest(
            p, lambda m: {**m, "files": {k: v for k, v in m["files"].items() if "optim" not in k}}),
        "manifest.json: damaged"),
    "manifest with numbers for entries": (
        lambda p: change_manifest(p, lambda m: {**m, "files": dict.fromkeys(m["files"], 3)}),
        "manifest.json: damaged"),
    "manifest that names ../x": (
        lambda p: change_manifest(p, lambda m: listing(m, "../../outside", OUTSIDE)), "'../../outside'"),
    "manifest that names ..": (lambda p: change_manifest(p, lambda m: listing(m, "..", OUTSIDE)), "'..'"),
    "manifest that names /etc/passwd": (
        lambda p: change_manifest(p, lambda m: listing(m, "/etc/passwd", OUTSIDE)), "'/etc/passwd'"),
    "a later format": (lambda p: change_manifest(p, lambda m: {"format": 2, "content": "elsewhere"}), "format 2"),
    "a later format of the state": (lambda p: signed(p, "state.json", '{"format": 7, "step": 3}'), "format 7"),
    "a state of nonsense": (lambda p: signed(p, "state.json", "\x00 what?"), "state.json: damaged"),
    "a step that is not a number": (lambda p: signed(p, "state.json", '{"format": 1, "step": "three"}'), "'three'"),
    "a step below zero": (lambda p: signed(p, "state.json", '{"format": 1, "step": -3}'), "-3"),
    "a config that is not YAML": (lambda p: signed(p, "config.yaml", "model: [}"), "config.yaml:1"),
    "a config of another version": (
        lambda p: signed(p, "config.yaml", "model: {type: transformer}\nwarp: 9\n"), "warp"),
    "weights that are text": (
        lambda p: signed(p, "model.safetensors", "no tensors here, only a text"), "model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(run: Path, name: str) -> None:
    """A damaged checkpoint is refused. Its run continues from the one before, with a note."""
    damage, named = DAMAGE[name]
    damage(step_folder(run, 3))
    before = tree(run)
    with pytest.raises(IceNetError) as alone:
        checkpoint.load(step_folder(run, 3))
    assert is_one_line(alone.value, str(step_folder(run, 3)), named)
    notes: list[str] = []
    found = checkpoint.find(run, notes.append)
    assert found.step == 2 and same_bits(found.weights, arrays(2))
    assert len(notes) == 1 and is_one_line(notes[0], "step-00000003", str(alone.value))
    assert tree(run) == before


def test_all_damaged(run: Path) -> None:
    for step in (1, 2, 3):
        cut(step_folder(run, step), "model.safetensors")
    notes: list[str] = []
    with pytest.raises(CheckpointError) as error:
        checkpoint.find(run, notes.append)
    assert notes == [] and is_one_line(error.value, str(run), "3 checkpoints", "step-00000003")


def test_skipped_checkpoints_are_logged(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(step_folder(run, 3), "model.safetensors")
    assert checkpoint.find(run).step == 2
    assert [record.name for record in caplog.records] == ["icenet"]
    assert is_one_line(caplog.messages[0], "step-00000003")


def test_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError) as error:
            checkpoint.find(path)
        assert is_one_line(error.value, str(path))
    assert checkpoint.newest(tmp_path) is None


def test_what_a_kill_leaves(run: Path, tmp_path: Path) -> None:
    """A partial folder is never read, and the next save removes it; the user's own folders stay."""
    partial_folder = run / "checkpoints" / ".step-00000004.partial"
    shutil.copytree(step_folder(run, 3), partial_folder)
    (partial_folder / "manifest.json").unlink()
    for own in ("step-best", "step-00000009.old", "step-3", "notes"):
        shutil.copytree(step_folder(run, 1), run / "checkpoints" / own)
    (run / "checkpoints" / "step-00000008").write_text("a file")
    assert checkpoint.find(run).step == 3
    checkpoint.save(run, tiny(tmp_path), 4, arrays(4), arrays(5), STATE, keep=1)
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"step-00000004", "step-best", "step-00000009.old", "step-3", "notes", "step-00000008"}


MOMENTS = 18
"""Number of calls of fsync and rename of one save."""


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_killed_while_writing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Killed at each fsync and each rename: the older checkpoints are intact, and the next save succeeds."""

    class Killed(BaseException):
        pass

    calls = [0]

    def counting(call: Callable[..., Any], *arguments: Any) -> Any:
        if calls[0] == moment:
            raise Killed
        calls[0] += 1
        return call(*arguments)

    before = {step: tree(step_folder(run, step)) for step in (1, 2, 3)}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "fsync", partial(counting, os.fsync))
        patch.setattr(os, "replace", partial(counting, os.replace))
        # a killed process does not clean up
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        checkpoint.save(run, tiny(tmp_path), 4, arrays(4), arrays(5), STATE)
    assert calls[0] == moment
    assert {step: tree(step_folder(run, step)) for step in (1, 2, 3)} == before
    found = checkpoint.find(run)
    # complete only after the last rename, which the last fsync follows
    assert found.step == (4 if moment == MOMENTS - 1 else 3)
    assert found.step == 3 or same_bits(found.weights, arrays(4))
    checkpoint.save(run, tiny(tmp_path), 4, arrays(4), arrays(5), STATE)
    assert checkpoint.find(run).step == 4
    assert not list((run / "checkpoints").glob(".*"))


def test_all_moments_are_tested(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, call=call: calls.append(call) or call(*args))
    checkpoint.save(run, tiny(tmp_path), 4, arrays(4), arrays(5), STATE)
    assert len(calls) == MOMENTS


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("moment", [0, 1, 4, 10])
def test_a_disk_that_refuses(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int, code: int
) -> None:
    calls = [0]
    fsync = os.fsync

    def refusing(handle: int) -> None:
        calls[0] += 1
        if calls[0] > moment:
            raise OSError(code, os.strerror(code))
        fsync(handle)

    before = tree(run)
    monkeypatch.setattr(os, "fsync", refusing)
    with pytest.raises(CheckpointError) as error:
        checkpoint.save(run, tiny(tmp_path), 4, arrays(4), arrays(5), STATE, keep=1)
    reason = "no space" if code == errno.ENOSPC else os.strerror(code)
    assert is_one_line(error.value, f"{step_folder(run, 4)}: ", reason, "step-00000003")
    assert tree(run) == before


def test_a_full_disk_in_a_run(tmp_path: Path) -> None:
    """A real limit on the size of files, in a process of its own: one line, and a run that resumes exactly."""
    pytest.importorskip("resource")
    config = tiny(tmp_path, "training.eval_every=null", "training.max_steps=12")
    Trainer.start(config, tmp_path / "whole", backend="mlx", quiet=True).fit()
    Trainer.start(config, tmp_path / "run", backend="mlx", quiet=True).fit(until=6)
    before = tree(tmp_path / "run" / "checkpoints")
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
        "from icenet.cli.main import main; sys.exit(main(['train', '--resume', 'run', '--quiet']))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=tmp_path, env=environment(tmp_path), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    note, error = done.stderr.splitlines()
    assert note.startswith("no effect: training.eval_batches")
    assert is_one_line(error, "icenet: run/checkpoints/step-00000010: ", "no space", "step-00000006")
    assert tree(tmp_path / "run" / "checkpoints") == before
    Trainer.resume(tmp_path / "run", quiet=True).fit()
    ours, theirs = (checkpoint.find(tmp_path / name) for name in ("run", "whole"))
    assert same_bits(ours.weights, theirs.weights) and same_bits(ours.optimizer, theirs.optimizer)


# ---- damage in a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    Trainer.start(tiny(folder), folder / "run", backend="mlx", quiet=True).fit(until=15)
    return folder / "run"


@pytest.fixture
def trained(original: Path, tmp_path: Path) -> Path:
    """A copy of a run of 20 steps that was stopped after step 15, with checkpoints every 5 steps."""
    return Path(shutil.copytree(original, tmp_path / "run"))


def test_a_run_continues_from_the_newest_intact_checkpoint(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(step_folder(trained, 15), "model.safetensors")
    flip(step_folder(trained, 10), "optimizer.safetensors")
    damaged = tree(step_folder(trained, 15))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "run", "--set", "training.eval_every=null"]) == 0
    said = capsys.readouterr().err
    for text in (
        "run/checkpoints/step-00000015/model.safetensors: damaged",
        "run/checkpoints/step-00000010/optimizer.safetensors: damaged",
        "unread-step-00000015",
    ):
        assert text in said
    Trainer.start(tiny(tmp_path), tmp_path / "whole", backend="mlx", quiet=True).fit()
    ours, theirs = checkpoint.find(trained), checkpoint.find(tmp_path / "whole")
    assert ours.step == 20 and same_bits(ours.weights, theirs.weights)
    # nothing is removed: the disk may recover, or the checkpoint may have a newer format
    assert tree(trained / "checkpoints" / "unread-step-00000015") == damaged
    assert [path.name for path in checkpoint.list_checkpoints(trained)] == [f"step-{n:08d}" for n in (5, 10, 15, 20)]


def test_generating_from_a_damaged_run_says_so(trained: Path, tmp_path: Path) -> None:
    flip(step_folder(trained, 15), "model.safetensors")
    result = icenet("generate", "run", "--max-new-tokens", "3", folder=tmp_path)
    assert is_one_line(result.stderr, "step-00000015")
    model = front_door.load(trained, backend="mlx")
    assert same_bits(model.weights(), dict(checkpoint.load(step_folder(trained, 10)).weights))


def test_a_state_without_a_loss_scale(trained: Path) -> None:
    signed(step_folder(trained, 15), "state.json", '{"format": 1, "step": 15, "loss_scale": {"scale": "big"}}')
    with pytest.raises(CheckpointError, match=r"state\.json: .*loss_scale"):
        Trainer.resume(trained, quiet=True)


def test_the_config_of_the_checkpoint_counts(trained: Path, tmp_path: Path) -> None:
    """RUN/config.yaml is a copy for the user: a run resumes without it."""
    (trained / "config.yaml").write_text("spoilt: [")
    resumed = Trainer.resume(trained, quiet=True)
    resumed.fit(until=16)
    assert Config.from_yaml(trained / "config.yaml") == resumed.config


# ---- checkpoints of earlier versions ----------------------------------------------------------------------

OLD_RUN = Path(__file__).parents[2] / "data" / "run-0.1"
"""A run of version 0.1.0 on MLX, stopped after 4 of 8 steps: a transformer with averaged weights."""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_of_version_0_1(here: Path, backend: str) -> None:
    """Loads with the same bits, also as averaged weights, and resumes on both backends."""
    shutil.copytree(OLD_RUN, here / "run")
    write_text(here / "text.txt")  # data.source of its config
    files = step_folder(here / "run", 4)
    stored = safetensors.numpy.load_file(files / "model.safetensors")
    optimizer = safetensors.numpy.load_file(files / "optimizer.safetensors")
    averaged = {name.removesuffix(".ema"): array for name, array in optimizer.items() if name.endswith(".ema")}
    assert same_bits(front_door.load("run", backend=backend).weights(), stored)
    assert same_bits(front_door.load("run", backend=backend, averaged=True).weights(), {**stored, **averaged})

    trainer = Trainer.resume(Path("run"), backend=backend, quiet=True)
    assert trainer.notes == [] and (trainer.step, trainer.config.backend) == (4, backend)
    assert same_bits(trainer.engine.weights(), stored) and same_bits(trainer.engine.optimizer_state(), optimizer)
    best = checkpoint.find(files).state["best"]
    assert EarlyStopping.read(best) == EarlyStopping(2, best["validation_loss"], num_bad_evals=1)
    trainer.fit()
    assert checkpoint.find(Path("run")).step == 8 and len(losses(Path("run"))) == 8
