"""How a run continues: from which checkpoint, in which folder and with which configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from icenet.core.config import Config
from icenet.core.errors import CheckpointError, UsageError
from icenet.core.runs import checkpoint as checkpoints
from icenet.core.runs import run_folder
from icenet.core.runs.checkpoint import Checkpoint
from icenet.core.runs.early_stopping import EarlyStopping


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


def find_continuation(
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
        CheckpointError: There is no intact checkpoint, the newest one is incomplete, or the checkpoints are missing.
    """
    checkpoints.check_link(path)
    if run_folder.has_no_checkpoint(path):
        if (lost := run_folder.lost_checkpoint(path)) is not None:
            raise CheckpointError(
                f"{path / checkpoints.FOLDER}: the checkpoint of step {lost} is missing; mount or move the folder "
                f"back, or begin a new run: icenet train {path / 'config.yaml'} --run NEW"
            )
        if run is not None and run.resolve() != path.resolve():
            run_folder.check_free(run)
        config = Config.from_yaml(path / "config.yaml", overrides, trust_code=False)
        notes = [f"{path}: ended before its first checkpoint; it begins again at step 1"]
        return Continuation(config, run or path, None, notes=notes)
    notes = []
    found = checkpoints.find(path, notes.append, skip_incomplete=False)
    origin = run_folder.run_of(found.path)
    if path.resolve() != found.path.resolve() and (lost := run_folder.lost_checkpoint(path)) is not None:
        notes.append(f"{path}: the checkpoint of step {lost} is missing; the run continues from step {found.step}")
    target = run or origin
    if target is None:
        raise UsageError(f"{path}: is not in the folder of a run; name a folder for the continuation with --run NEW")
    branch = origin is None or target.resolve() != origin.resolve()
    if not branch:
        newer = [other.name for other in checkpoints.list_checkpoints(target, found.step)]
        if path.resolve() == found.path.resolve() and _any_intact(target, found.step):
            raise UsageError(
                f"{path}: the run continued to {newer[-1]}; resume {target} to continue there, "
                "or give --run NEW to branch off here"
            )
    else:
        run_folder.check_free(target)
    config = found.config.with_overrides(*overrides)
    config = config.with_overrides(f"backend={backend or config.backend}")
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


def _any_intact(run: Path, after: int) -> bool:
    """Returns whether a run has an intact checkpoint after a step."""
    for path in checkpoints.list_checkpoints(run, after):
        with contextlib.suppress(CheckpointError):
            checkpoints.verify(path)
            return True
    return False
