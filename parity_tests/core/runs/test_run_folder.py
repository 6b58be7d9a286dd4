"""The folder of a run belongs to the user: nothing in it is replaced or lost without a message."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import is_one_line, losses, metrics, resume, same_bits, state, tiny, train, tree

import icenet
from icenet.cli.main import main
from icenet.core.errors import CheckpointError, IceNetError, UsageError
from icenet.core.report.metrics import MetricsLog
from icenet.core.runs import checkpoint, run_folder, saved_model
from icenet.core.training import signals
from icenet.core.training.trainer import Trainer

pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def default_sighup() -> Iterator[None]:
    """These tests also run under nohup, which ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("icenet.core.report.plots.plot_metrics", lambda *_, **__: None)
        train(tiny(folder, "training.eval_every=null"), folder / "run", "torch", until=15)
    return folder / "run"


@pytest.fixture
def run(original: Path, tmp_path: Path, no_plots: None) -> Path:
    """A run of 20 steps that was stopped after step 15, with checkpoints every 5 steps."""
    return Path(shutil.copytree(original, tmp_path / "run"))


# ---- new runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json", "plot.png", "metrics.jsonl", "best", "run.json"])
def test_a_new_run_replaces_no_file_of_the_user(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / name).write_text("mine")
    (folder / "notes.txt").write_text("mine")
    before = tree(folder)
    with pytest.raises(UsageError) as error:
        Trainer.start(tiny(tmp_path), folder, backend="torch", quiet=True)
    assert is_one_line(error.value, str(folder), "--run")
    assert tree(folder) == before and not (folder / ".lock").exists()


def test_the_config_next_to_which_a_run_is_placed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "exp").mkdir()
    (here / "exp" / "config.yaml").write_text(tiny(here).to_yaml())
    before = tree(here)
    assert main(["train", "exp/config.yaml", "--run", "exp"]) == 2
    assert is_one_line(capsys.readouterr().err, "exp", "config.yaml", "--run")
    assert main(["train", "exp/config.yaml", "--run", ""]) == 2
    assert is_one_line(capsys.readouterr().err, "--run", "empty")
    assert tree(here) == before


def test_names_of_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("two\nlines", "x" * 300, "file", "file/below"):
        with pytest.raises(UsageError) as error:
            run_folder.check_free(tmp_path / name)
        assert is_one_line(error.value, "--run"), name
    (tmp_path / "folder").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "folder" / "checkpoints").symlink_to(tmp_path / "disk")  # nothing would be replaced
    (tmp_path / "folder" / "notes.txt").touch()
    run_folder.check_free(tmp_path / "folder")


def test_home_folder_in_an_option(here: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None) -> None:
    """A shell leaves the ~ of --run=~/x as it is."""
    monkeypatch.setenv("HOME", str(here / "home"))
    (here / "c.yaml").write_text(tiny(here, "training.max_steps=1", "training.eval_every=null").to_yaml())
    assert main(["train", "c.yaml", "--run=~/x", "--backend", "torch", "--quiet"]) == 0
    assert (here / "home" / "x" / "run.json").is_file() and not (here / "~").exists()


def test_runs_that_start_together_get_their_own_folders(tmp_path: Path) -> None:
    numbers: list[int] = []
    barrier = threading.Barrier(8)

    def create() -> None:
        barrier.wait()
        numbers.append(run_folder.create_numbered(tmp_path / "runs" / "name"))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 9))
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"name", *(f"name-{n}" for n in range(2, 9))}


def test_a_numbered_run_is_trained_in_its_own_folder(tmp_path: Path, no_plots: None) -> None:
    config = tiny(tmp_path, "training.max_steps=2", "training.eval_every=null")
    both = [Trainer.start(config, tmp_path / "run", numbered=True, backend="torch", quiet=True) for _ in range(2)]
    results = [trainer.fit() for trainer in both]
    assert [result.run.name for result in results] == ["run", "run-2"]
    assert all(result.checkpoint.is_dir() for result in results)


def test_a_folder_in_use_says_so(tmp_path: Path) -> None:
    with run_folder.locked(tmp_path / "run"), pytest.raises(CheckpointError) as error:
        run_folder.check_free(tmp_path / "run")
    assert is_one_line(error.value, "another process trains this run", "--run")


def test_a_run_that_began_meanwhile_is_not_replaced(run: Path, tmp_path: Path) -> None:
    late = Trainer.start(tiny(tmp_path), tmp_path / "late", backend="torch", quiet=True)
    os.rename(run, tmp_path / "late")
    before = tree(tmp_path / "late")
    with pytest.raises(UsageError, match="contains a run already"):
        late.fit()
    assert tree(tmp_path / "late") == before


# ---- runs that end before their first step -----------------------------------------------------------------


class Loss:
    is_good = False

    def __call__(self, output: Any, batch: dict[str, Any]) -> Any:
        if not self.is_good:
            raise IceNetError("the loss needs other labels")
        return (output * output).mean()


@pytest.mark.parametrize("existing", [[], ["notes.txt"], ["tensorboard/mine", ".lock"]])
def test_a_failed_first_step_leaves_the_folder_as_it_was(
    tmp_path: Path, no_plots: None, existing: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny(tmp_path, "training.max_steps=2", "training.eval_every=null")
    run = tmp_path / "run"
    for name in existing:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    before, loss = tree(run), Loss()
    for _ in range(2):
        trainer = Trainer.start(config, run, numbered=not existing, backend="torch", quiet=True, loss=loss)
        with pytest.raises(IceNetError, match="other labels"):
            trainer.fit()
        assert tree(run) == before and run.exists() == bool(existing)
    assert is_one_line(caplog.messages[-1], str(run), "ended before its first step", "removed")
    loss.is_good = True
    assert trainer.fit().run == run


def test_a_run_that_was_killed_before_its_first_step_is_replaced(
    tmp_path: Path, no_plots: None, caplog: pytest.LogCaptureFixture
) -> None:
    config, killed = tiny(tmp_path, "training.max_steps=2", "training.eval_every=null"), tmp_path / "killed"
    killed.mkdir()
    run_folder.prepare(killed, config, {"tokenizer.json": b"{}"}, 0, None)
    (killed / "metrics.jsonl").write_text('{"step": 0, "note": "of the first run"}\n')
    changed, outside = (Path(shutil.copytree(killed, tmp_path / name)) for name in ("changed", "outside"))
    assert train(config, killed, "torch").step == 2
    assert is_one_line(caplog.messages[0], str(killed), "replaces")
    assert "of the first run" not in (killed / "metrics.jsonl").read_text()
    assert not (killed / "tokenizer.json").exists()  # the tokenizer of this run is `bytes`

    (changed / "config.yaml").write_text("mine")
    (tmp_path / "mine").write_text("mine")
    record = json.loads((outside / "run.json").read_text())
    record["files"]["../mine"] = hashlib.sha256(b"mine").hexdigest()
    (outside / "run.json").write_text(json.dumps(record))
    for folder in (changed, outside):
        before = tree(tmp_path)
        with pytest.raises(UsageError) as error:
            train(config, folder, "torch")
        assert is_one_line(error.value, str(folder), "a run already", "--run") and tree(tmp_path) == before


# ---- resuming ---------------------------------------------------------------------------------------------


def no_record(run: Path) -> None:
    (run / "run.json").unlink()  # as in a run of an earlier version


def dangling(run: Path) -> None:
    os.rename(run / "checkpoints", run.parent / "disk")
    (run / "checkpoints").symlink_to(run.parent / "not-mounted")


MISSING: dict[str, Callable[[Path], object]] = {
    "moved": lambda run: os.rename(run / "checkpoints", run.parent / "elsewhere"),
    "empty": lambda run: [shutil.rmtree(path) for path in (run / "checkpoints").iterdir()],
    "a link to nothing": dangling,
    "moved, of an earlier version": lambda run: (no_record(run), shutil.rmtree(run / "checkpoints")),
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_checkpoints_stop_a_run(run: Path, name: str) -> None:
    MISSING[name](run)
    before = tree(run)
    with pytest.raises(CheckpointError) as error:
        Trainer.resume(run, quiet=True)
    assert is_one_line(error.value, str(run / "checkpoints"), "mount")
    assert tree(run) == before


def test_a_missing_newest_checkpoint_is_named(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(checkpoint.path_of(run, 15))
    resumed = Trainer.resume(run, quiet=True)
    assert resumed.step == 10 and is_one_line(resumed.notes[0], "step 15", "step 10")
    moved = [record for record in MetricsLog.read(run / "metrics.jsonl") if record["step"] > 10]
    resumed.fit()
    assert MetricsLog.read(run / "metrics-replaced.jsonl") == moved and len(moved) == 5
    assert any(is_one_line(message, "5 steps after step 10", "metrics-replaced.jsonl") for message in caplog.messages)
    assert len(losses(run)) == 20
    assert json.loads((run / "run.json").read_text())["checkpoint"] == 20


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "state.json"])
def test_an_incomplete_checkpoint_is_named(run: Path, name: str) -> None:
    """It was copied incompletely. The one before it is used if the user names it."""
    (checkpoint.path_of(run, 15) / name).unlink()
    with pytest.raises(CheckpointError) as error:
        Trainer.resume(run, quiet=True)
    older = checkpoint.path_of(run, 10)
    assert is_one_line(error.value, name, "step-00000015", f"--resume {older}")
    resume(older, until=11)
    assert (run / "checkpoints" / "unread-step-00000015").is_dir()
    assert len(losses(run)) == 11


def test_a_damaged_checkpoint_is_not_the_way_out_of_an_incomplete_one(run: Path) -> None:
    newest, middle, oldest = (checkpoint.path_of(run, step) for step in (15, 10, 5))
    (newest / "state.json").unlink()
    (middle / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError) as error:
        Trainer.resume(run, quiet=True)
    assert is_one_line(error.value, "step-00000015", f"--resume {oldest}")
    (oldest / "config.yaml").write_text("# damaged")
    with pytest.raises(CheckpointError) as error:
        Trainer.resume(run, quiet=True)
    assert is_one_line(error.value, "all of its 3 checkpoints", "step-00000015")
    assert "use another checkpoint" not in str(error.value) and "--resume " not in str(error.value)


def test_a_changed_config_is_kept(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = (run / "config.yaml").read_text() + "# mine\n"
    (run / "config.yaml").write_text(text)
    resume(run, until=16)
    assert (run / "config-replaced.yaml").read_text() == text
    assert any(is_one_line(message, "config.yaml", "--set", "config-replaced.yaml") for message in caplog.messages)
    caplog.clear()
    resume(run, until=17)  # the run's own config is replaced without a word
    assert not any("config" in message for message in caplog.messages)
    assert not (run / "config-replaced-2.yaml").exists()


def test_missing_metrics_are_named(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "metrics.jsonl").unlink()
    resume(run, until=16)
    assert any(is_one_line(message, "metrics.jsonl", "step 16") for message in caplog.messages)


def test_old_checkpoints_with_files_of_the_user_stay(run: Path) -> None:
    notes = checkpoint.path_of(run, 5) / "notes.txt"
    notes.write_text("mine")
    resume(run, until=16, overrides=["training.keep_checkpoints=1"])
    assert notes.read_text() == "mine"
    assert [path.name for path in checkpoint.list_checkpoints(run)] == ["step-00000005", "step-00000016"]


# ---- saved models -----------------------------------------------------------------------------------------


def test_saving_replaces_a_saved_model_and_nothing_else(run: Path, tmp_path: Path) -> None:
    model, folder = icenet.load(run, backend="torch"), tmp_path / "saved"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.yaml").write_text("mine")
    (tmp_path / "text.txt").write_text("mine")
    before = tree(tmp_path)
    for path in (run, run / "checkpoints" / "step-00000005", "theirs", "x.safetensors", "x.pt", "text.txt"):
        with pytest.raises(UsageError) as error:
            icenet.save(model, tmp_path / path)
        assert is_one_line(error.value, str(tmp_path / path))
    with pytest.raises(UsageError, match="is a run"):
        icenet.save(model, run, overwrite=True)
    assert tree(tmp_path) == before
    for _ in range(2):
        assert icenet.save(model, folder) == folder
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + "# mine\n")
    with pytest.raises(UsageError, match="overwrite=True"):
        icenet.save(model, folder)
    icenet.save(model, folder, overwrite=True)
    assert saved_model.files_of(folder) >= {"config.yaml", "model.safetensors"}
    assert same_bits(icenet.load(folder, backend="torch").weights(), model.weights())


def test_a_conversion_does_not_enter_a_run(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(run)
    for target, form in ((run, "canonical"), (run / "model.safetensors", "mlx"),
                         (checkpoint.path_of(run, 5) / "x.pt", "torch")):  # fmt: skip
        assert main(["convert", str(run), str(target), "--to", form, "--overwrite"]) == 2
        assert is_one_line(capsys.readouterr().err, "choose another")
    assert tree(run) == before
    (here / "folder").mkdir()
    (here / "folder" / "config.yaml").write_text("mine")
    assert main(["convert", str(run), "folder", "--to", "canonical"]) == 2
    assert is_one_line(capsys.readouterr().err, "folder/config.yaml", "--overwrite")
    assert list(tree(here / "folder")) == ["config.yaml"]


# ---- signals ----------------------------------------------------------------------------------------------


def test_repeated_signals_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal and its shell may both send SIGHUP, a launcher and its process group SIGTERM or Ctrl-C."""
    seen: list[str] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us without it
    try:
        with signals.on_stop_signal(seen.append):
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
                signal.raise_signal(number)
            monkeypatch.setattr(signals, "_REPEAT_SECONDS", 0.0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == ["SIGHUP", "SIGHUP", "SIGTERM", "SIGTERM", "Ctrl-C"]


def test_an_ignored_hangup_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.raising(), signals.on_stop_signal(lambda name: pytest.fail(name)):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_temporary_files(
    run: Path, here: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """During a conversion, between two arrays."""
    from icenet.core.weights import files as weight_files

    write_file = weight_files.write_file

    def stopped(*arguments: object) -> None:
        write_file(*arguments)  # type: ignore[arg-type]
        signal.raise_signal(number)

    monkeypatch.setattr(weight_files, "write_file", stopped)
    before, handler = tree(here), signal.getsignal(number)
    assert main(["convert", str(run), "x.safetensors", "--to", "mlx"]) == 1
    assert capsys.readouterr().err == f"icenet: stopped by {number.name}\n"
    assert tree(here) == before and signal.getsignal(number) == handler


def test_a_closed_terminal_saves_the_run(tmp_path: Path, no_plots: None) -> None:
    config = tiny(tmp_path, "training.checkpoint_every=20", "training.eval_every=null")
    trainer = Trainer.start(config, tmp_path / "run", backend="torch", quiet=True)
    step = trainer.engine.train_step

    def closing(batch: object, number: int, *rest: float) -> object:
        if number == 6:
            signal.raise_signal(signal.SIGHUP)
        return step(batch, number, *rest)  # type: ignore[arg-type]

    trainer.engine.train_step = closing  # type: ignore[assignment, method-assign]
    with pytest.raises(IceNetError) as error:
        trainer.fit()
    assert is_one_line(error.value, "stopped by SIGHUP after step 7", "--resume")
    resume(tmp_path / "run")
    train(config, tmp_path / "whole", "torch")
    assert same_bits(state(tmp_path / "run"), state(tmp_path / "whole"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
