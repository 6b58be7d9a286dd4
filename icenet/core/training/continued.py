"""What a continued run takes from its checkpoint, next to the weights and the state of the optimizer."""

from __future__ import annotations

from pathlib import Path

from icenet.core.config import Config
from icenet.core.errors import CheckpointError
from icenet.core.runs.checkpoint import Checkpoint, path_of
from icenet.core.runs.early_stopping import EarlyStopping
from icenet.core.training.loss_scale import LossScale


def loss_scale(found: Checkpoint, config: Config) -> LossScale:
    """Returns the loss scale of a checkpoint, or a new one if the precision is another.

    Raises:
        CheckpointError: The checkpoint has no valid one.
    """
    precision = config.training.mixed_precision
    if precision != found.config.training.mixed_precision:
        return LossScale.for_precision(precision)
    try:
        return LossScale.read(found.state.get("loss_scale"))
    except ValueError:
        raise CheckpointError(f"{found.path / 'state.json'}: damaged: it has no valid loss_scale") from None


def best_evaluation(found: Checkpoint, config: Config, run: Path) -> EarlyStopping:
    """Returns the best evaluation of a run; none if `training.keep_best` needs its checkpoint, which is gone."""
    best = EarlyStopping.read(found.state.get("best"))
    is_kept = best.step is None or path_of(run, best.step).is_dir()
    return best if is_kept or not config.training.keep_best else EarlyStopping()
