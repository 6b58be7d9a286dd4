"""The folder of a run: its name, its lock, its files, and the point from which a run continues."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from icenet.core import files
from icenet.core.config import Config
from icenet.core.errors import CheckpointError, UsageError
from icenet.core.training import checkpoint as checkpoints
from icenet.core.training.checkpoint import Checkpoint
from icenet.core.training.early_stopping import EarlyStopping

LOCK = ".lock"
BEST = "best"
"""Name of the link in a run's folder to the checkpoint of the lowest validation loss."""


def new_run_folder(config: str) -> Path:
    """Returns the folder for a new run of a config, named after it: runs/NAME, or runs/NAME-2 if that exists."""
    base = Path("runs") / Path(config).stem
    number, folder = 1, base
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def run_of(checkpoint: Path) -> Path | None:
    """Returns the run whose folder contains a checkpoint; None for a checkpoint that was copied elsewhere."""
    if checkpoint.parent.name != checkpoints.FOLDER:
        checkpoint = checkpoint.resolve()
    return checkpoint.parent.parent if checkpoint.parent.name == checkpoints.FOLDER else None


def has_no_checkpoint(path: Path) -> bool:
    """Returns whether this is the folder of a run that ended before its first checkpoint."""
    begun = (path / "config.yaml").is_file() and ((path / LOCK).is_file() or (path / "metrics.jsonl").is_file())
    return begun and not checkpoints.list_checkpoints(path)


def is_run_folder(folder: Path) -> bool:
    """Returns whether the folder contains results of a run, or is a checkpoint or a saved model itself."""
    run = bool(checkpoints.list_checkpoints(folder)) or (folder / "metrics.jsonl").exists()
    weights = (folder / checkpoints.MANIFEST).is_file() or any(folder.glob("model*.safetensors*"))
    return run or weights or folder.resolve().parent.name == checkpoints.FOLDER


@dataclass(frozen=True)
class Continuation:
    """The checkpoint, the folder and the configuration with which a run continues.

    Attributes:
        config: The configuration, with overrides.
        run: The folder of the continuation.
        found: The checkpoint; None if the run has none and starts again at step 1.
        branched_from: The run, or the single checkpoint, that stays unchanged if `run` is another folder; else None.
        notes: Messages for the user.
    """

    config: Config
    run: Path
    found: Checkpoint | None
    branched_from: Path | None = None
    notes: list[str] = field(default_factory=list)


def continuation(
    path: Path, run: Path | None = None, overrides: Sequence[str] = (), backend: str | None = None
) -> Continuation:
    """Decides how a run continues.

    Args:
        path: A run, which continues from its newest intact checkpoint, or a checkpoint.
        run: Another folder for the continuation; the run of `path` stays unchanged. Required for a checkpoint that
            is not the newest of its run.
        overrides: Changes of the configuration, `KEY=VALUE`.
        backend: The backend of the continuation; None keeps that of the run.

    Raises:
        UsageError: The run is complete or continued after the checkpoint, or the new folder contains a run.
        CheckpointError: There is no intact checkpoint.
    """
    if has_no_checkpoint(path):
        if run is not None and run.resolve() != path.resolve():
            _must_be_free(run)
        config = Config.from_yaml(path / "config.yaml", overrides, trust_code=False)
        notes = [f"{path}: ended before its first checkpoint; it begins again at step 1"]
        return Continuation(config, run or path, None, notes=notes)
    notes = []
    found = checkpoints.find(path, notes.append)
    origin = run_of(found.path)
    target = run or origin
    if target is None:
        raise UsageError(f"{path}: is not in the folder of a run; name a folder for the continuation with --run NEW")
    branch = origin is None or target.resolve() != origin.resolve()
    if not branch:
        newer = [other.name for other in checkpoints.list_checkpoints(target, found.step)]
        if newer and path.resolve() == found.path.resolve():
            raise UsageError(
                f"{path}: the run continued to {newer[-1]}; resume {target} to continue there, "
                "or give --run NEW to branch off here"
            )
    else:
        _must_be_free(target)
    config = found.config.with_overrides(*overrides, *([f"backend={backend}"] if backend else []))
    if found.step >= config.training.max_steps:
        raise UsageError(
            f"{path}: the run is complete at step {found.step}; to continue: "
            f"--set training.max_steps={2 * found.step}"
        )
    best = EarlyStopping.read(found.state.get("best"))
    if not branch and best.should_stop(config.training.early_stopping):
        raise UsageError(
            f"{path}: the run stopped early at step {found.step}; to continue: --set training.early_stopping=null, "
            f"or more than {best.num_bad_evals}"
        )
    return Continuation(config, target, found, (origin or found.path) if branch else None, notes)


def _must_be_free(folder: Path) -> None:
    if is_run_folder(folder):
        raise UsageError(f"{folder}: contains a run already; choose another --run for the continuation")


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Locks the folder of a run during the block, so that one process at a time trains it.

    Raises:
        CheckpointError: Another process trains the run.
        UsageError: The folder cannot be written.
    """
    with contextlib.ExitStack() as lock:
        try:
            # waits a little, because `is_locked` of another process holds the lock for an instant
            lock.enter_context(files.locked(run / LOCK, timeout=0.5))
        except TimeoutError:
            raise CheckpointError(
                f"{run}: another process trains this run; wait for it, or choose another --run"
            ) from None
        except OSError as error:
            raise _not_writable(run, error) from None
        yield


def is_locked(run: Path) -> bool:
    """Returns whether a process trains the run."""
    return files.is_locked(run / LOCK)


def create(run: Path) -> None:
    """Creates the folder of a run.

    Raises:
        UsageError: It cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(run, error) from None


def _not_writable(run: Path, error: OSError) -> UsageError:
    return UsageError(f"{run}: cannot be written ({error.strerror}); choose another --run")


def prepare(
    run: Path, config: Config, dataset_files: Mapping[str, bytes], step: int, best_step: int | None
) -> list[str]:
    """Brings the folder of a locked run to the state from which training continues after `step`.

    Args:
        run: The folder.
        config: Written as config.yaml.
        dataset_files: Content of the dataset's files by name (`Dataset.files`).
        step: Number of completed steps. Checkpoints of later steps are damaged and set aside.
        best_step: Step of the checkpoint that the link `best` points to; None for no link.

    Returns:
        Notes for the user.
    """
    notes = [
        f"{unread.name} is kept as {checkpoints.set_aside(unread).name}"
        for unread in checkpoints.list_checkpoints(run, step)
    ]
    checkpoints.write_config(run, config, dataset_files)
    if best_step is not None:
        link_best(run, checkpoints.path_of(run, best_step))
    return notes


def link_best(run: Path, checkpoint: Path) -> None:
    """Points RUN/best to an existing checkpoint. Does nothing on a file system without symbolic links."""
    if not checkpoint.is_dir():
        return
    with contextlib.suppress(OSError):
        files.replace_symlink(run / BEST, checkpoint.relative_to(run))


def unlink_stale_best(run: Path) -> None:
    """Removes RUN/best if its checkpoint no longer exists."""
    with contextlib.suppress(OSError):
        if (run / BEST).is_symlink() and not (run / BEST).exists():
            (run / BEST).unlink()


def versions() -> dict[str, str]:
    """Returns the versions of the installed packages on which the results of a run depend."""
    found = {}
    for name in ("icenet", "mlx", "torch", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
