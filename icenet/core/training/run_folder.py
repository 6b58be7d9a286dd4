"""The folder of a run: its name, its lock, where it goes on, and what can be told from what lies in it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from icenet.core.config import Config
from icenet.core.errors import CheckpointError, UsageError
from icenet.core.training.checkpoint import Checkpoint, find, list_checkpoints
from icenet.core.training.early_stopping import EarlyStopping


def new_run_folder(config: str) -> Path:
    """A folder for a new run of a config, named after it: runs/NAME, or runs/NAME-2 where that is taken."""
    base = Path("runs") / Path(config).stem
    number, folder = 1, base
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def run_of(checkpoint: Path) -> Path | None:
    """The run in whose folder a checkpoint lies; None for a checkpoint that was copied elsewhere."""
    if checkpoint.parent.name != "checkpoints":
        checkpoint = checkpoint.resolve()
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


def has_no_checkpoint(path: Path) -> bool:
    """Whether this is the folder of a run that ended before it had a checkpoint."""
    begun = (path / "config.yaml").is_file() and ((path / ".lock").is_file() or (path / "metrics.jsonl").is_file())
    return begun and not list_checkpoints(path)


def is_run_folder(folder: Path) -> bool:
    """Whether a run has left something in this folder, or it is a checkpoint or a saved model itself."""
    run = bool(list_checkpoints(folder)) or (folder / "metrics.jsonl").exists()
    weights = (folder / "manifest.json").is_file() or any(folder.glob("model*.safetensors*"))
    return run or weights or folder.resolve().parent.name == "checkpoints"


@dataclass(frozen=True)
class Continuation:
    """Where a run goes on: from which checkpoint, in which folder, with which configuration."""

    config: Config
    run: Path
    found: Checkpoint | None
    """None: the run ended before it had one, and begins again."""
    branched_from: Path | None = None
    """The run, or the lone checkpoint, that stays as it is, where the continuation has another folder."""
    notes: list[str] = field(default_factory=list)


def continuation(
    path: Path, run: Path | None = None, overrides: Sequence[str] = (), backend: str | None = None
) -> Continuation:
    """How to continue a run (its newest good checkpoint) or a checkpoint.

    With `run` the continuation goes to another folder, and the run it came from stays as it is. A checkpoint that
    is not its run's newest needs one.

    Raises:
        UsageError: the run is complete or went on after the checkpoint, or the new folder holds a run.
        CheckpointError: there is no good checkpoint.
    """
    if has_no_checkpoint(path):
        if run is not None and run.resolve() != path.resolve():
            _must_be_free(run)
        config = Config.from_yaml(path / "config.yaml", overrides, trust_code=False)
        notes = [f"{path}: ended before its first checkpoint; it begins again at step 1"]
        return Continuation(config, run or path, None, notes=notes)
    notes = []
    found = find(path, notes.append)
    origin = run_of(found.path)
    target = run or origin
    if target is None:
        raise UsageError(f"{path}: lies in no run's folder; say with --run NEW where to continue")
    branch = origin is None or target.resolve() != origin.resolve()
    if not branch:
        newer = [other.name for other in list_checkpoints(target, found.step)]
        if newer and path.resolve() == found.path.resolve():
            raise UsageError(
                f"{path}: the run went on to {newer[-1]}; resume {target} to continue there, "
                "or give --run NEW to branch off here"
            )
    else:
        _must_be_free(target)
    config = found.config.with_overrides(*overrides, *([f"backend={backend}"] if backend else []))
    if found.step >= config.training.max_steps:
        raise UsageError(
            f"{path}: the run is complete at step {found.step}; to go on: --set training.max_steps={2 * found.step}"
        )
    best = EarlyStopping.read(found.state.get("best"))
    if not branch and best.should_stop(config.training.early_stopping):
        raise UsageError(
            f"{path}: the run stopped early at step {found.step}; to go on: --set training.early_stopping=null, "
            f"or more than {best.num_bad_evals}"
        )
    return Continuation(config, target, found, (origin or found.path) if branch else None, notes)


def _must_be_free(folder: Path) -> None:
    if is_run_folder(folder):
        raise UsageError(f"{folder}: holds a run already; choose another --run for the continuation")


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """One process at a time works on a run; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    try:
        handle = os.open(run / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UsageError(f"{run}: cannot be written ({error.strerror}); choose another --run") from None
    try:
        for again in (True, False):  # `icenet runs` looks at the lock for an instant
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not again:
                    raise CheckpointError(
                        f"{run}: another process trains this run; wait for it, or choose another --run"
                    ) from None
                time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def versions() -> dict[str, str]:
    """The versions of what a run's numbers depend on, of the packages that are installed."""
    found = {}
    for name in ("icenet", "mlx", "torch", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
