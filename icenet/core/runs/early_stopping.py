"""Early stopping: the lowest validation loss of a run and the number of evaluations since."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icenet.core.config import Config
from icenet.core.runs.checkpoint import Checkpoint, path_of


@dataclass
class EarlyStopping:
    """The best evaluation so far. It is part of a checkpoint, so a resumed run continues to count."""

    step: int | None = None
    """Step of the lowest validation loss; None before the first finite one."""
    validation_loss: float | None = None
    """The lowest validation loss, in nats."""
    num_bad_evals: int = 0
    """Evaluations in a row without a lower loss."""

    def update(self, step: int, validation_loss: float) -> bool:
        """Records an evaluation and returns whether it is the best so far. NaN never is."""
        if step == self.step:  # the same evaluation again, by a run that was resumed at this step
            return False
        if validation_loss < (math.inf if self.validation_loss is None else self.validation_loss):
            self.step, self.validation_loss, self.num_bad_evals = step, validation_loss, 0
            return True
        self.num_bad_evals += 1
        return False

    def should_stop(self, patience: int | None) -> bool:
        """Returns whether `patience` evaluations in a row brought no lower loss. None disables early stopping."""
        return patience is not None and self.num_bad_evals >= patience

    @property
    def reason(self) -> str:
        """Reason to stop the run, for a message."""
        best = (
            "none was finite" if self.step is None else f"the best is {self.validation_loss:.4f} at step {self.step}"
        )
        plural = "" if self.num_bad_evals == 1 else "s"
        return f"{self.num_bad_evals} evaluation{plural} without a lower validation loss; {best}"

    @classmethod
    def of_checkpoint(cls, found: Checkpoint, config: Config, run: Path) -> EarlyStopping:
        """Returns the best evaluation of a run that continues from a checkpoint.

        It is the initial state if `training.keep_best` needs the checkpoint of that evaluation, which is gone.
        """
        best = cls.read(found.state.get("best"))
        is_kept = best.step is None or path_of(run, best.step).is_dir()
        return best if is_kept or not config.training.keep_best else cls()

    @classmethod
    def read(cls, stored: Any) -> EarlyStopping:
        """Returns the entry `best` of a checkpoint's state.json; the initial state if it is absent or invalid."""
        if not isinstance(stored, Mapping):
            return cls()
        num_bad_evals = int(stored.get("num_bad_evals", stored.get("waited", 0)))  # "waited" until version 0.1
        step, loss = stored.get("step"), stored.get("validation_loss")
        if step is None and loss is None:  # no evaluation was finite
            return cls(num_bad_evals=num_bad_evals)
        if not isinstance(step, int) or not isinstance(loss, (int, float)) or not math.isfinite(loss):
            return cls()
        return cls(step, float(loss), num_bad_evals)
