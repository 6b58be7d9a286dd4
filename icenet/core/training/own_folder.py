"""The folder in which a trainer writes its run, and the checks that no other run or process writes there."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path

from icenet.core.distributed.processes import ProcessGroup
from icenet.core.errors import CheckpointError
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

    def create(self) -> None:
        """Creates the folder. A numbered one gets its name, the same in all processes.

        Raises:
            UsageError: The path cannot be that of a folder, or a new run would replace files there.
            FileError: The folder cannot be written.
            CheckpointError: Another process trains a run there.
        """
        if self.is_numbered:
            number = run_folder.create_numbered(self.path) if self._writes else 0
            number = int(self._process_group.gather([float(number)])[0, 0])
            self.path = run_folder.numbered(self.path, number)
            self.is_numbered, self._checkpoints = False, []
        elif self._writes:
            if self.is_new:
                run_folder.check_free(self.path)  # before the lock, which would make it look like a run
            run_folder.create(self.path)

    def locked(self) -> AbstractContextManager[None]:
        """Returns a context in which no other process can train the run (see `run_folder.locked`)."""
        return run_folder.locked(self.path) if self._writes else contextlib.nullcontext()

    def check(self) -> None:
        """Checks the locked folder. It is then the folder of this run.

        Raises:
            UsageError: Another process began a run in the folder after the trainer was created.
            CheckpointError: Another process trained the run after the trainer was created.
        """
        if self._writes and self.is_new:
            run_folder.check_free(self.path, holds_lock=True)
        self.is_new = False
        if self._writes and checkpoints.list_checkpoints(self.path) != self._checkpoints:
            raise CheckpointError(f"{self.path}: another process continued this run meanwhile; resume it again")

    def remember_checkpoints(self) -> None:
        """Records the checkpoints, which `check` expects when training continues."""
        self._checkpoints = checkpoints.list_checkpoints(self.path)
