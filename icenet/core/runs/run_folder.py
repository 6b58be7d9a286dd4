"""The folder of a run: its name, its lock and its files.

    RUN/
        run.json             the step of the newest complete checkpoint, and SHA-256 of config.yaml and tokenizer.json
        .lock                held by the process that trains the run
        config.yaml          with tokenizer.json, unless the tokenizer is `bytes`
        metrics.jsonl        see `icenet.core.report.metrics`
        plot.png
        best                 a link to a checkpoint
        checkpoints/         see `icenet.core.runs.checkpoint`
        tensorboard/         with `training.tensorboard`

A new run takes a folder only if it contains none of these files. So all files of these names in the folder of a run
are files of the run, except those that the user changed: config.yaml and tokenizer.json are compared with run.json
before they are written again. A run that ended before its first step keeps no other run from its folder: an error in
that step removes its files, and the next run removes those that a kill left.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from icenet.core import files
from icenet.core.config import Config
from icenet.core.errors import CheckpointError, FileError, IceNetError, UsageError
from icenet.core.report.metrics import MetricsLog
from icenet.core.report.reporter import METRICS
from icenet.core.report.tensorboard import FOLDER as TENSORBOARD
from icenet.core.runs import checkpoint as checkpoints
from icenet.core.tokenizers.base import TOKENIZER_FILE
from icenet.core.tokenizers.companions import COMPANIONS

LOCK = ".lock"
RECORD = "run.json"
BEST = "best"
"""Name of the link in a run's folder to the checkpoint of the lowest validation loss."""
_CONFIG = "config.yaml"
_FORMAT = 1
_NAMES = (
    *(_CONFIG, TOKENIZER_FILE, *COMPANIONS, METRICS, "plot.png"),
    *(BEST, checkpoints.FOLDER, TENSORBOARD, RECORD),
)
"""The visible names in the folder of a run."""
_FOLDERS = (checkpoints.FOLDER, TENSORBOARD)
"""Those of folders, in which a run replaces nothing. They may exist, for example as links to a larger disk."""


# --- names and contents -------------------------------------------------------------------------------------


def default_folder(config: str) -> Path:
    """Returns the folder of the first run of a config, named after it: runs/NAME."""
    return Path("runs") / Path(config).stem


def create_numbered(base: Path) -> int:
    """Creates the folder `base`, or `base-2`, `base-3`, ... if that exists. Returns the number, 1 for `base`.

    Of several processes that do this at the same moment, each gets its own folder.

    Raises:
        UsageError: The path cannot be that of a folder.
        FileError: It cannot be written, for example because of a missing permission.
    """
    number = 1
    while True:
        try:
            numbered(base, number).mkdir(parents=True)
            return number
        except FileExistsError:
            number += 1
            if not base.parent.is_dir():
                raise UsageError(f"{base.parent}: is a file; rename it, or choose a folder with --run") from None
        except OSError as error:
            raise not_writable(base, error) from None


def numbered(base: Path, number: int) -> Path:
    """Returns the folder with a number that `create_numbered` returned."""
    return base if number == 1 else base.with_name(f"{base.name}-{number}")


def run_of(checkpoint: Path) -> Path | None:
    """Returns the run whose folder contains a checkpoint; None for a checkpoint that was copied elsewhere."""
    if checkpoint.parent.name != checkpoints.FOLDER:
        checkpoint = checkpoint.resolve()
    return checkpoint.parent.parent if checkpoint.parent.name == checkpoints.FOLDER else None


def has_no_checkpoint(path: Path) -> bool:
    """Returns whether this is the folder of a run that ended before its first checkpoint, or lost its checkpoints."""
    begun = (path / LOCK).is_file() or (path / METRICS).is_file() or bool(_record(path))
    return begun and (path / _CONFIG).is_file() and not checkpoints.list_checkpoints(path)


def description(folder: Path) -> str | None:
    """Returns what a folder is to IceNet, such as "a run"; None if it is neither a run nor a part of one."""
    if (enclosing := checkpoints.enclosing(folder)) is not None:
        return "a checkpoint" if enclosing == folder.resolve() else f"in the checkpoint {enclosing}"
    if checkpoints.list_checkpoints(folder) or (folder / METRICS).exists() or has_no_checkpoint(folder):
        return "a run"
    return None


def other_files(run: Path) -> list[str]:
    """Returns the names in the folder of a run that are not those of a run. Hidden files are left out."""
    if not run.is_dir():
        return []
    names = (path.name for path in run.iterdir())
    return sorted(
        name
        for name in names
        if name not in (*_NAMES, "schedule.png") and name[0] != "." and not re.search(r"-replaced|^\d+_Dense$", name)
    )


def check_free(run: Path, holds_lock: bool = False) -> None:
    """Checks that a new run may use a folder: it must not contain anything that the run would replace.

    Args:
        run: The folder, which need not exist.
        holds_lock: Whether this process holds the lock of the run.

    Raises:
        UsageError: It is a file, another run, a checkpoint, or contains files with names of a run.
        FileError: It cannot be read, for example because of a missing permission.
        CheckpointError: Another process trains a run there.
    """
    if re.search(r"[\x00-\x1f\x7f]", str(run)):
        raise UsageError(f"{str(run)!r}: the name of a run must not contain control characters; choose another --run")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(run)  # a name that is too long, or below a file
            if not run.is_dir():
                raise UsageError(f"{run}: is not a folder; choose another --run")
        if not holds_lock and is_locked(run):
            raise _in_use(run)
        found = description(run)
        if found == "a run" and not is_without_steps(run):
            raise UsageError(
                f"{run}: contains a run already; continue it with --resume {run}, or choose another --run"
            )
        if found not in (None, "a run"):
            raise UsageError(f"{run}: is {found}; choose another --run")
        if _record(run):
            return  # a run that was killed before it wrote its config
        if any(run.glob("model*.safetensors*")):
            raise UsageError(f"{run}: contains a model, not a run; choose another --run")
        for name in _NAMES:
            if os.path.lexists(run / name) and not (name in _FOLDERS and (run / name).is_dir()):
                raise UsageError(
                    f"{run}: contains {name}, which a run would replace; choose another --run, such as {run / 'run'}"
                )
    except OSError as error:
        raise not_writable(run, error) from None


# --- run.json -----------------------------------------------------------------------------------------------


def _record(run: Path) -> dict[str, Any]:
    """Returns the content of run.json; an empty dict if there is none, or if it is damaged."""
    try:
        content = json.loads((run / RECORD).read_bytes())
        return content if isinstance(content, dict) and content.get("format") == _FORMAT else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _write_record(run: Path, **changes: Any) -> None:
    content = {"format": _FORMAT, "checkpoint": None, "files": {}, **_record(run), **changes}
    files.write_text(run / RECORD, json.dumps(content, indent=1))


def record_checkpoint(run: Path, step: int) -> None:
    """Records in run.json that the checkpoint of a step is complete."""
    with contextlib.suppress(IceNetError):  # the checkpoint itself is complete
        _write_record(run, checkpoint=step)


def lost_checkpoint(run: Path) -> int | None:
    """Returns the step of a checkpoint that the run wrote after the newest that is there; None if there is none.

    A run of a version without run.json must have written one if its metrics reach `training.checkpoint_every`.

    Raises:
        IceNetError: The metrics cannot be read.
    """
    newest = checkpoints.newest(run)
    step = int(newest.name.partition("-")[2]) if newest else 0
    record = _record(run)
    last: Any = record.get("checkpoint")
    if not record and newest is None and (run / METRICS).is_file():
        with contextlib.suppress(IceNetError):  # a config that cannot be read is reported later
            every = Config.from_yaml(run / _CONFIG, trust_code=False).training.checkpoint_every
            last = last_step(run) // every * every
    return last if isinstance(last, int) and last > step else None


def last_step(run: Path) -> int:
    """Returns the last step of the metrics of a run; 0 without metrics."""
    if not (run / METRICS).is_file():
        return 0
    steps = [record.get("step") for record in MetricsLog.read(run / METRICS)]
    return max((step for step in steps if isinstance(step, int)), default=0)


def is_without_steps(run: Path) -> bool:
    """Returns whether a run ended before its first step: it has no metrics and had no checkpoint.

    False if the user changed a file of the run.
    """
    record = _record(run)
    if not record or record.get("checkpoint") is not None or checkpoints.list_checkpoints(run):
        return False
    if (run / METRICS).is_file() and not all("note" in line for line in MetricsLog.read(run / METRICS)):
        return False
    return all(_is_below(name) and _sha256(run / name) in (sha, None) for name, sha in _written(run))


def remove_without_steps(run: Path) -> None:
    """Removes the files of a run that ended before its first step (see `is_without_steps`), but not its lock.

    Raises:
        FileError: A file cannot be removed.
    """
    try:
        folders = {run / checkpoints.FOLDER}
        for name, _ in [*_written(run), (METRICS, None), (RECORD, None)]:
            (run / name).unlink(missing_ok=True)
            folders |= {run / parent for parent in Path(name).parents[:-1]}
        for folder in folders:
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
    except OSError as error:
        raise not_writable(run, error) from None


def _written(run: Path) -> list[tuple[str, Any]]:
    """Returns the names and the SHA-256 of the files that run.json lists."""
    found = _record(run).get("files")
    return [(name, sha) for name, sha in found.items()] if isinstance(found, dict) else []


def _is_below(name: str) -> bool:
    """Returns whether a name in run.json is that of a file in the folder. A folder from elsewhere may list others."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


# --- locks and files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Locks the folder of a run during the block, so that one process at a time trains it.

    Raises:
        CheckpointError: Another process trains the run.
        FileError: The folder cannot be written.
    """
    with contextlib.ExitStack() as lock:
        try:
            # waits a little, because `is_locked` of another process holds the lock for an instant
            lock.enter_context(files.locked(run / LOCK, timeout=0.5))
        except TimeoutError:
            raise _in_use(run) from None
        except OSError as error:
            raise not_writable(run, error) from None
        yield


def is_locked(run: Path) -> bool:
    """Returns whether a process trains the run."""
    return files.is_locked(run / LOCK)


def create(run: Path) -> None:
    """Creates the folder of a run.

    Raises:
        UsageError: The path cannot be that of a folder.
        FileError: It cannot be written, for example because of a missing permission.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(run, error) from None


def _in_use(run: Path) -> CheckpointError:
    return CheckpointError(f"{run}: another process trains this run; wait for it, or choose another --run")


def not_writable(folder: Path, error: OSError, option: str = "--run") -> IceNetError:
    """Returns the error of a folder that cannot be written, which an option names."""
    kind = UsageError if error.errno in _WRONG_PATH else FileError
    return kind(f"{folder}: cannot be written ({error.strerror}); choose another {option}")


_WRONG_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.EINVAL)
"""Errors of a path that no folder can have. The others, such as a missing permission, are those of this machine."""


def prepare(
    run: Path, config: Config, dataset_files: Mapping[str, bytes], step: int, best_step: int | None
) -> list[str]:
    """Brings the folder of a locked run to the state from which training continues after `step`.

    Args:
        run: The folder.
        config: Written as config.yaml. A config.yaml that the user changed is kept under another name.
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
    written = checkpoints.config_files(config, dataset_files)
    for name, content in written.items():
        if _is_changed(run, name, content):
            kept = files.set_aside(run / name)
            unused = " and is not used (--set changes a key)" if step else ""  # step 0: the run is read from it
            notes.append(f"{run / name}: was changed{unused}; it is kept as {kept.name}")
    # run.json first: it marks the other files as those of the run
    _write_record(run, files={name: hashlib.sha256(content).hexdigest() for name, content in written.items()})
    for name, content in written.items():
        files.write_bytes(run / name, content)
    if step and not (run / METRICS).exists():
        notes.append(f"{run / METRICS}: is missing; the metrics begin at step {step + 1}")
    best = run / BEST
    if config.training.keep_best and best.is_dir() and not best.is_symlink():
        kept = files.set_aside(best)
        notes.append(f"{best}: is a folder instead of a link (a copy without links?); it is kept as {kept.name}")
    if config.training.keep_best and (reason := files.no_symlinks(run)):
        notes.append(
            f"{best}: this file system has no symbolic links ({reason}); icenet runs shows the step of the best "
            "checkpoint, which is kept"
        )
    if best_step is not None:
        link_best(run, checkpoints.path_of(run, best_step))
    return notes


def _is_changed(run: Path, name: str, content: bytes) -> bool:
    """Returns whether a file in the folder of a run is neither `content` nor what the run wrote there before."""
    path = run / name
    if not path.is_file():
        return False
    found = path.read_bytes()
    recorded = _record(run).get("files")
    if isinstance(recorded, dict):
        earlier = hashlib.sha256(found).hexdigest() == recorded.get(name)
    else:  # a run of a version without run.json
        copies = [checkpoint / name for checkpoint in checkpoints.list_checkpoints(run)]
        earlier = not copies or any(copy.is_file() and copy.read_bytes() == found for copy in copies)
    return found != content and not earlier


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
