"""The best evaluation of a run, and whether it is time to stop."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINK = "best"
"""The name in a run's folder that leads to the checkpoint of the lowest validation loss."""


@dataclass
class EarlyStopping:
    """The lowest validation loss so far, the step it was found at, and the evaluations since."""

    step: int | None = None
    validation_loss: float | None = None
    num_bad_evals: int = 0

    def take(self, step: int, validation_loss: float) -> bool:
        """Takes in an evaluation; says whether it is the best."""
        if step == self.step:  # evaluated again, by a run that was resumed here
            return False
        best = math.inf if self.validation_loss is None else self.validation_loss
        if validation_loss < best:  # one that is no number is none
            self.step, self.validation_loss, self.num_bad_evals = step, validation_loss, 0
            return True
        self.num_bad_evals += 1
        return False

    def should_stop(self, patience: int | None) -> bool:
        """Whether so many evaluations brought nothing that the run should stop."""
        return patience is not None and self.num_bad_evals >= patience

    @property
    def reason(self) -> str:
        """Why it is time to stop."""
        than = f" than {self.validation_loss:.4f} at step {self.step}" if self.step is not None else ", none a number"
        return f"{self.num_bad_evals} evaluations without a lower validation loss{than}"

    @classmethod
    def read(cls, stored: Any) -> EarlyStopping:
        """What a checkpoint's state holds; anew where it holds none."""
        if not isinstance(stored, Mapping) or not isinstance(stored.get("step"), int):
            return cls()
        loss = stored.get("validation_loss")
        num_bad_evals = stored.get("num_bad_evals", stored.get("waited", 0))  # `waited` until version 0.1
        if not isinstance(loss, (int, float)) or not math.isfinite(loss):
            return cls()
        return cls(stored["step"], float(loss), int(num_bad_evals))


def tidy(run: Path) -> None:
    """Removes RUN/best where it leads to a checkpoint that is gone."""
    with contextlib.suppress(OSError):
        if (run / LINK).is_symlink() and not (run / LINK).exists():
            (run / LINK).unlink()


def link(run: Path, checkpoint: Path) -> None:
    """Lets RUN/best lead to a checkpoint that is there; where links cannot be made there is none."""
    if not checkpoint.is_dir():
        return
    temporary = run / f".{LINK}.{os.getpid()}"
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(checkpoint.relative_to(run), target_is_directory=True)
        os.replace(temporary, run / LINK)
