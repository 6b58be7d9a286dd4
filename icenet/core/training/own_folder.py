"""The folder in which a trainer writes its run, and the checks that no other run or process writes there."""

from __future__ import annotations

import contextlib
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

from icenet.core.distributed.processes import ProcessGroup
from icenet.core.errors import CheckpointError, FileError
from icenet.core.runs import checkpoint as checkpoints
from icenet.core.runs import run_folder


class OwnFolder:
    """The folder of a run that is trained. Of several processes the first one writes it.

    Attributes:
        path: The folder. That of a numbered run gets its number in `create`.
        is_new: Whether it must not contain a run yet.
        is_numbered: Whether a number is added to its name if that exists.
        branched_from: The run whose metrics are copied to it; None if there is none, or they are copied.
    """

    def __init__(self, path: Path, process_group: ProcessGroup) -> None:
        self.path = path
        self.is_new = False
        self.is_numbered = False
        self.branched_from: Path | None = None
        self._process_group = process_group
        self._writes = process_group.rank == 0
        self._checkpoints = checkpoints.list_checkpoints(path)
        self._before: set[str] | None = None  # the names in the folder before this run; None if it was absent
        self._began: Literal["", "new", "continued"] = ""

    def create(self) -> None:
        """Creates the folder. A numbered one gets its name, the same in all processes.

        Raises:
            UsageError: The path cannot be that of a folder, or a new run would replace files there.
            FileError: The folder cannot be written.
            CheckpointError: Another process trains a run there.
        """
        self._before, self._began = None, ""
        if self.is_numbered:
            number = run_folder.create_numbered(self.path) if self._writes else 0
            number = int(self._process_group.gather([float(number)])[0, 0])
            self.path = run_folder.numbered(self.path, number)
            self.is_numbered, self._checkpoints = False, []
        elif self._writes:
            if self.is_new:
                run_folder.check_free(self.path)  # before the lock, which would make it look like a run
            if self.path.exists():
                self._before = {path.name for path in self.path.iterdir()}
            run_folder.create(self.path)

    def locked(self) -> AbstractContextManager[None]:
        """Returns a context in which no other process can train the run (see `run_folder.locked`)."""
        return run_folder.locked(self.path) if self._writes else contextlib.nullcontext()

    def check(self) -> list[str]:
        """Checks the locked folder. It is then the folder of this run.

        Returns:
            Notes for the user.

        Raises:
            UsageError: Another process began a run in the folder after the trainer was created.
            CheckpointError: Another process trained the run after the trainer was created.
            FileError: A file of an earlier run, which ended before its first step, cannot be removed.
        """
        notes = []
        if self._writes and self.is_new:
            run_folder.check_free(self.path, holds_lock=True)
            if run_folder.is_without_steps(self.path):
                run_folder.remove_without_steps(self.path)
                notes.append(f"{self.path}: had a run that ended before its first step; this run replaces it")
        if self._writes and checkpoints.list_checkpoints(self.path) != self._checkpoints:
            raise CheckpointError(f"{self.path}: another process continued this run meanwhile; resume it again")
        self._began = "new" if self.is_new else "continued"
        self.is_new = False
        return notes

    def remember_checkpoints(self) -> None:
        """Records the checkpoints, which `check` expects when training continues."""
        if self._began:  # otherwise the next call must find the work of another process too
            self._checkpoints = checkpoints.list_checkpoints(self.path)

    def remove_without_steps(self) -> list[str]:
        """Removes what a new run wrote, if it has failed before its first step. Its name is then free again.

        Returns:
            Notes for the user.
        """
        if not self._writes or self._began != "new":
            return []
        with contextlib.suppress(OSError, FileError):  # the error that ended the run says more
            if is_ours := run_folder.is_without_steps(self.path):
                run_folder.remove_without_steps(self.path)
                before = self._before or set()
                if run_folder.TENSORBOARD not in before:
                    shutil.rmtree(self.path / run_folder.TENSORBOARD, ignore_errors=True)
                if run_folder.LOCK not in before:
                    (self.path / run_folder.LOCK).unlink(missing_ok=True)
                if self._before is None and not any(self.path.iterdir()):
                    self.path.rmdir()
                self.is_new = True
            if is_ours:
                return [f"{self.path}: the run ended before its first step; its files are removed"]
        return []
