"""The folder of a run: its name, its lock, and what can be told from what lies in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from icenet.core.checkpoint import list_checkpoints
from icenet.core.errors import CheckpointError, UsageError


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


def killed_at_birth(path: Path) -> bool:
    """Whether this is the folder of a run that ended before it had a checkpoint."""
    begun = (path / "config.yaml").is_file() and ((path / ".lock").is_file() or (path / "metrics.jsonl").is_file())
    return begun and not list_checkpoints(path)


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
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"{run}: another process trains this run; wait for it, or choose another --run"
            ) from None
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
