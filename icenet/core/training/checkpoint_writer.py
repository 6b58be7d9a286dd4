"""Writes the checkpoints of a run in the background while training continues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.config import Config, user_code
from icenet.core.config.custom import is_custom
from icenet.core.data.datasets import Dataset
from icenet.core.engine import Engine
from icenet.core.errors import IceNetError
from icenet.core.models.twins import describe
from icenet.core.runs import checkpoint as checkpoints
from icenet.core.runs.early_stopping import EarlyStopping
from icenet.core.runs.run_folder import link_best, record_checkpoint, unlink_stale_best, versions
from icenet.core.training.background import Background
from icenet.core.training.loss_scale import LossScale


class CheckpointWriter:
    """Writes checkpoints from a copy in memory, one at a time, in a thread.

    Each process of a run has one: collecting sharded arrays needs all of them. Only the first process writes.
    Errors of the thread are raised by `check` and `wait`, and on leaving the context.
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        engine: Engine,
        dataset: Dataset,
        saved_step: int | None,
        given: Sequence[str] = (),
        layers: Mapping[str, bytes] = {},
    ) -> None:
        """
        Args:
            run: Folder of the run.
            config: Written to each checkpoint.
            engine: Source of weights and optimizer state.
            dataset: Source of the fingerprint and files of the data.
            saved_step: Step of the checkpoint that the run was resumed from, if it is in `run`.
            given: What a program has passed in place of keys of the configuration: data, loss.
            layers: Content of the files of `embedding.dense` by name.
        """
        self.run = run
        self.config = config
        self.engine = engine
        self.dataset = dataset
        self.saved_step = saved_step
        """Step of the last checkpoint that was started."""
        self._given = list(given)
        self._layers = layers
        self._background = Background()

    def is_saved(self, step: int) -> bool:
        """Returns whether the checkpoint of a step is complete or being written."""
        if step != self.saved_step:
            return False
        # several processes must agree, and only the first one knows the disk and the thread
        several = self.engine.process_group.size > 1
        return several or self._background.busy or checkpoints.path_of(self.run, step).is_dir()

    def start(self, step: int, loss_scale: LossScale, early_stopping: EarlyStopping) -> None:
        """Copies the state of the run and starts to write it, after the previous checkpoint is complete."""
        self.saved_step = step
        if self.engine.process_group.rank == 0:
            self._background.wait()  # before the copy: two copies would be in memory
            weights, optimizer = self.engine.weights(), self.engine.optimizer_state()
            state = {
                "loss_scale": asdict(loss_scale),
                "best": asdict(early_stopping),
                "data": self.dataset.fingerprint,
                "facts": self.dataset.facts,
                "backend": self.engine.backend,
                "device": self.engine.device,
                "tf32": self.engine.tf32,
                "versions": versions(),
            }
            last_batch = getattr(self.dataset, "last_batch", None)  # of a user's data
            if last_batch is not None and last_batch["step"] == step - 1:
                state["last_batch"] = last_batch
            if self._given:
                state["given"] = self._given
            if is_custom(self.config.model.type):
                state["model"] = describe(self.engine.model).as_dict()
                state["code"] = user_code.hashes(self.engine.model.code)
            if is_custom(self.config.training.loss):  # a partial function, given in Python, has no module
                state["loss_code"] = user_code.hashes(getattr(self.engine.loss, "__module__", ""))
            self._background.start(partial(self._write, step, weights, optimizer, state))
        elif self.config.training.sharded:  # the first process collects the shards of all processes
            self.engine.weights()
            self.engine.optimizer_state()
        else:  # `weights` averages the batch norm statistics over the processes
            self.engine.average_statistics()

    def check(self) -> None:
        """Raises the error of the checkpoint that was written last, if it has failed."""
        self._background.check()

    def wait(self) -> None:
        """Waits until the checkpoint is on the disk, and raises its error if it has failed."""
        self._background.wait()

    def __enter__(self) -> CheckpointWriter:
        self._background = Background()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._background.__exit__(kind, error, trace)
        finally:
            self._background = Background()  # for a checkpoint between two calls of `fit`

    def _write(
        self,
        step: int,
        weights: Mapping[str, NDArray[Any]],
        optimizer: Mapping[str, NDArray[Any]],
        state: dict[str, Any],
    ) -> None:
        wrong = next((name for name, array in weights.items() if not np.isfinite(array).all()), None)
        if wrong is not None:  # an update can overflow although loss and gradients did not
            raise IceNetError(
                f"step {step}: {wrong} is not finite; {last_good(self.run)}. Lower training.learning_rate"
            )
        training = self.config.training
        best = state["best"]["step"] if training.keep_best else None
        path = checkpoints.save(
            self.run,
            self.config,
            step,
            weights,
            optimizer,
            state,
            training.keep_checkpoints,
            best,
            {**self.dataset.files, **self._layers},
            origin.metadata() if (origin := self.engine.model.origin) else {},
        )
        record_checkpoint(self.run, step)
        if step == best:
            link_best(self.run, path)
        unlink_stale_best(self.run)


def last_good(run: Path) -> str:
    """Names the newest checkpoint of a run, for an error message."""
    newest = checkpoints.newest(run)
    return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
