"""The one training loop. It talks to an Engine and knows no framework.

    trainer = Trainer.start(config, Path("runs/first"))        # or Trainer.resume(Path("runs/first"), ...)
    result = trainer.fit()

Everything in a step is a function of the step's number and the state in the checkpoint, so a run that was
killed and resumed ends where the uninterrupted one does, and on the same backend bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from icenet.core import backends, engine
from icenet.core import files as staging
from icenet.core.config import Config, custom
from icenet.core.data.datasets import dataset_for
from icenet.core.distributed import processes, watchdog
from icenet.core.errors import CheckpointError, IceNetError, UsageError
from icenet.core.report import plots, tensorboard
from icenet.core.report.metrics import MetricsLog
from icenet.core.report.progress import Progress
from icenet.core.training import checkpoint as checkpoints
from icenet.core.training.background import Background
from icenet.core.training.early_stopping import EarlyStopping, link, tidy
from icenet.core.training.loss_scale import LossScale
from icenet.core.training.run_folder import continuation, is_run_folder, locked, versions
from icenet.core.training.schedule import learning_rate
from icenet.core.training.signals import stopping


class Interrupted(IceNetError):
    """Training was asked to stop (Ctrl-C, SIGTERM) and did, with its state saved."""


@dataclass(frozen=True)
class Result:
    """What a call of `fit` came to."""

    run: Path
    step: int
    loss: float
    validation_loss: float | None
    checkpoint: Path
    plot: Path | None
    validation_accuracy: float | None = None
    best: EarlyStopping = field(default_factory=EarlyStopping)
    stopped_early: bool = False
    """`training.early_stopping` ended it."""


_ITEMS = {"tok": "tokens", "img": "images"}
_MOST_SKIPPED = 10
"""Steps in a row without a finite gradient, after which a run ends whatever `training.on_nan` says."""


class Trainer:
    """A run folder, an engine and the loop between them. Make one with `start` or `resume`.

    Those only read; `fit` writes, when it has the run to itself.
    """

    def __init__(
        self, config: Config, run: Path, engine: engine.Engine, step: int, scale: LossScale, quiet: bool = False
    ) -> None:
        self.config = config
        self.run = run
        self.engine = engine
        self.step = step
        """Steps done."""
        self.scale = scale
        self.process_group = engine.process_group
        self.is_main_process = self.process_group.rank == 0
        """Whether this process writes and prints; the only one does, and the first of several."""
        self.quiet = quiet or not self.is_main_process
        self.dataset = processes.in_turn(self.process_group, partial(dataset_for, config, quiet=self.quiet))
        self.notes: list[str] = []
        self.best = EarlyStopping()
        self._background = Background()
        self._skipped = 0
        self._branched_from: Path | None = None
        self._present = checkpoints.list_checkpoints(run)
        self._saved_step = step if step else -1
        self._last_loss = math.nan
        self._last_validation: float | None = None
        self._last_accuracy: float | None = None
        self._stop: str | None = None
        self._began = self._seconds = 0.0
        self._watch = watchdog.Watchdog(self.process_group, run)

    # ---- beginnings --------------------------------------------------------------------------------------

    @classmethod
    def start(
        cls, config: Config, run: Path, *, backend: str | None = None, device: str | None = None, quiet: bool = False
    ) -> Trainer:
        """A new run in a folder that holds none.

        Raises:
            UsageError: the folder holds a run already.
        """
        config = config.checked()
        if is_run_folder(run):
            raise UsageError(f"{run}: holds a run already; continue it with --resume {run}, or choose another --run")
        custom.trust(config.model.type)
        return cls._fresh(config, run, backend, device, quiet)

    @classmethod
    def _fresh(cls, config: Config, run: Path, backend: str | None, device: str | None, quiet: bool) -> Trainer:
        # the choice goes into the run's config, so that --resume alone continues on the same backend
        config = config.with_overrides(f"backend={backend or config.backend}")
        engine = backends.engine(config, None, device)
        return cls(config, run, engine, 0, LossScale.for_precision(config.training.mixed_precision), quiet)

    @classmethod
    def resume(
        cls,
        path: Path,
        *,
        run: Path | None = None,
        overrides: Sequence[str] = (),
        backend: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        quiet: bool = False,
    ) -> Trainer:
        """Continues a run (its newest good checkpoint) or a checkpoint, on either backend; see `continuation`."""
        plan = continuation(path, run, overrides, backend)
        if plan.found is None:
            trainer = cls._fresh(plan.config, plan.run, backend, device, quiet)
            trainer.notes = plan.notes
            return trainer
        config, found = plan.config, plan.found
        engine = backends.engine(config, None, device, dtype=dtype)
        engine.set_weights(dict(found.weights))
        engine.set_optimizer_state(dict(found.optimizer))
        scale = LossScale.for_precision(config.training.mixed_precision)
        if config.training.mixed_precision == found.config.training.mixed_precision:
            try:
                stored = found.state["loss_scale"]
                scale = LossScale(float(stored["scale"]), int(stored["good_steps"]))
            except (KeyError, TypeError, ValueError):
                raise CheckpointError(f"{found.path / 'state.json'}: damaged: no loss_scale in it") from None
        trainer = cls(config, plan.run, engine, found.step, scale, quiet)
        trainer.notes = plan.notes
        best = EarlyStopping.read(found.state.get("best"))
        kept = checkpoints.path_of(plan.run, best.step or 0).is_dir()
        if plan.branched_from is None and (kept or not config.training.keep_best):
            trainer.best = best  # else its checkpoint is not here: the best is that of the evaluations to come
        trainer._branched_from = plan.branched_from
        if plan.branched_from is not None:
            trainer._saved_step = -1  # in the new folder nothing is saved yet
        if found.state.get("data") != trainer.dataset.fingerprint:
            held = "images" if trainer.dataset.unit == "img" else "text"
            trainer.notes.append(
                f"the {held} of data.source {config.data.source} is not what the checkpoint was trained on"
            )
        return trainer

    def _make_folder(self) -> None:
        try:
            self.run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.run}: cannot be written ({error.strerror}); choose another --run") from None

    def _settle(self, log: MetricsLog) -> None:
        """Puts the folder in the state from which training goes on; only when the run is locked."""
        if self.is_main_process and checkpoints.list_checkpoints(self.run) != self._present:
            raise CheckpointError(f"{self.run}: another process went on with this run meanwhile; resume it again")
        if self._branched_from is not None:
            self.save(wait=True)  # first: a branch that is killed can then be resumed without its origin
            if self.is_main_process:
                MetricsLog.copy(self._branched_from / "metrics.jsonl", self.run / "metrics.jsonl", self.step)
            self._branched_from = None
        if not self.is_main_process:
            return
        for unread in checkpoints.list_checkpoints(self.run, self.step):
            self.notes.append(f"{unread.name} is kept as {checkpoints.set_aside(unread).name}")
        for name, content in self.dataset.files.items():
            staging.write_bytes(self.run / name, content)
        if self.config.training.keep_best and self.best.step is not None:
            link(self.run, checkpoints.path_of(self.run, self.best.step))
        staging.write_text(self.run / "config.yaml", checkpoints.carried(self.config, self.dataset.files).to_yaml())
        log.truncate_after(self.step)

    # ---- the loop ----------------------------------------------------------------------------------------

    def fit(self, until: int | None = None) -> Result:
        """Trains to `training.max_steps`, or to step `until`; the state is saved when it returns.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the state was saved.
            IceNetError: the loss is not a number, or a checkpoint could not be written.
        """
        training = self.config.training
        self._stop = self.process_group.stop = None
        last = min(training.max_steps, until or training.max_steps)
        items = training.batch_size * self.dataset.items_per_row
        board = None
        if training.tensorboard and self.is_main_process:
            board = tensorboard.TensorBoardLog(self.run / tensorboard.FOLDER)
        log = MetricsLog(self.run / "metrics.jsonl", beside=board)
        self._agree()
        if self.is_main_process:
            self._make_folder()
        progress = Progress(
            training.max_steps,
            self.step,
            tokens_per_step=items,
            unit=self.dataset.unit,
            quiet=self.quiet,
            label=f"{self.engine.backend} {self.engine.device}",
        )
        self._watch = watchdog.Watchdog(self.process_group, self.run)
        lock = locked(self.run) if self.is_main_process else contextlib.nullcontext()
        others = processes.explaining(self.process_group, self.run)
        with lock, log, stopping(self._ask_to_stop), progress, self._watch, others:
            settled = False
            try:
                with Background() as self._background:
                    self._settle(log)
                    settled = True
                    if board is not None:
                        board.begin(self.step, MetricsLog.read(log.path) if log.path.exists() else ())
                    for note in self.notes if self.is_main_process else ():
                        (logging.getLogger("icenet").warning if self.quiet else progress.note)(note)
                    self.notes.clear()
                    over = self._run(last, log, progress)
            finally:
                self._background = Background()  # for a `save` between two calls of `fit`
                if settled:  # else what another process did must be seen the next time too
                    self._present = checkpoints.list_checkpoints(self.run)
        checkpoint = checkpoints.path_of(self.run, self._saved_step)
        plot = None
        if self.is_main_process:
            plot = plots.plot_metrics(MetricsLog.read(log.path), self.run / "plot.png", title=self.run.name)
        return Result(
            self.run,
            self.step,
            self._last_loss,
            self._last_validation,
            checkpoint,
            plot,
            self._last_accuracy,
            self.best,
            over,
        )

    def _agree(self) -> None:
        """Waits until all processes have read what they begin with, before the first one writes."""
        if self.process_group.size > 1:
            found = {"step": str(self.step), "config": self.config.to_yaml(), "data": str(self.dataset.fingerprint)}
            processes.agree(self.process_group, found)

    def _ask_to_stop(self, signal: str) -> None:
        if self.process_group.size > 1:
            self.process_group.stop = signal  # the result of a step says it to all processes
        else:
            self._stop = signal

    def _run(self, last: int, log: MetricsLog, progress: Progress) -> bool:
        """The loop; says whether it ended before `last` because evaluations got no better."""
        training = self.config.training
        lagged = training.mixed_precision != "fp16" and training.on_nan == "stop"
        pending: tuple[int, float, Any] | None = None
        while self.step < last:
            self._began, self._seconds = time.perf_counter(), 0.0
            self._watch.beat()
            self._background.check()
            step, rate = self.step, learning_rate(self.step, training)
            batch = self.dataset.train_batch(step, training.batch_size)
            handle = self.engine.train_step(batch, step, rate, self.scale.scale)
            self.step = done = step + 1  # at once: whatever goes wrong from here on, the step is taken
            if pending is not None:  # the device works on this step while the host looks at the last one
                self._record(pending, log, progress)
            pending = (step, rate, handle)
            evaluates = training.eval_every is not None and (done % training.eval_every == 0 or done == last)
            saves = done % training.checkpoint_every == 0 or done == last or self._stop is not None
            if evaluates or saves or not lagged:
                self._record(pending, log, progress)
                pending = None
            over = False
            if evaluates:
                saves |= self._evaluate(log, progress) and training.keep_best
                over = self.best.should_stop(training.early_stopping) and done < last
            if saves or over:
                self.save(wait=over)
            if over:
                progress.note(f"step {done}: stopped early: {self.best.reason}")
                return True
            if self._stop is not None and done < training.max_steps:
                if pending is not None:
                    self._record(pending, log, progress)
                self.save(wait=True)  # the signal may have come after `saves` was decided
                raise Interrupted(
                    f"stopped by {self._stop} after step {done}; "
                    f"everything is saved: icenet train --resume {self.run}"
                )
        self.save(wait=True)  # begun in the last turn, or what could not be written before
        return False

    def _record(self, pending: tuple[int, float, Any], log: MetricsLog, progress: Progress) -> None:
        step, rate, handle = pending
        result = self.engine.read(handle)
        # a turn of the loop is a step's time, whether the device works while the host goes on or not; where two steps
        # are read in one turn, it is that of each, or what the second was waited for
        now = time.perf_counter()
        self._seconds, self._began = max(now - self._began, self._seconds), now
        done = step + 1
        self._stop = self._stop or result.stop
        self._check(done, result)
        fp16 = self.config.training.mixed_precision == "fp16"
        if fp16:
            self.scale.update(result.finite)
        if math.isfinite(result.loss):
            self._last_loss = result.loss
        if not self.is_main_process:
            return
        speed = self.config.training.batch_size * self.dataset.items_per_row / max(self._seconds, 1e-9)
        log.append(
            {
                "step": done,
                "loss": result.loss,
                "learning_rate": rate,
                "grad_norm": result.grad_norm,
                f"{_ITEMS[self.dataset.unit]}_per_second": round(speed, 1),
                "backend": self.engine.backend,
                **({"loss_scale": self.scale.scale} if fp16 else {}),
                **({"skipped": not result.finite} if fp16 or not result.finite else {}),
            }
        )
        progress.update(done, result.loss, learning_rate=rate, tokens_per_second=speed)

    def _check(self, done: int, result: engine.StepResult) -> None:
        """Ends the run where a step's loss or gradients are no numbers and it may not be left out."""
        training = self.config.training
        self._skipped = 0 if result.finite else self._skipped + 1
        if result.finite:
            return
        overflow = training.mixed_precision == "fp16" and math.isfinite(result.loss) and self.scale.scale > 1
        if overflow or (training.on_nan == "skip" and self._skipped < _MOST_SKIPPED):
            return
        with contextlib.suppress(IceNetError):
            self._background.wait()  # what is being written may be the last good one
        again = f", {self._skipped} times in a row" if self._skipped > 1 else ""
        named = ", ".join(f"{path} {norm:.3g}" for path, norm in result.largest)
        raise IceNetError(
            f"step {done}: the loss is {result.loss} and the gradient norm {result.grad_norm}{again} "
            f"(largest: {named}); {self._last_good()}. "
            "Lower training.learning_rate, raise training.warmup_steps, or leave such steps out with "
            "training.on_nan=skip"
        )

    def _last_good(self) -> str:
        newest = checkpoints.newest(self.run)
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"

    def _evaluate(self, log: MetricsLog, progress: Progress) -> bool:
        """Evaluates and logs it; says whether it is the best so far."""
        training = self.config.training
        total = counted = right = 0.0
        classifies = False
        self.process_group.average_statistics(self.engine.model)
        for batch in self.dataset.validation_batches(training.batch_size, training.eval_batches):
            self._watch.beat()
            found = self.engine.evaluate(processes.share_rows(batch, self.process_group))
            total, counted = total + found.loss * found.labels, counted + found.labels
            right, classifies = right + (found.correct or 0), found.correct is not None
        total, counted, right = self.process_group.gather([total, counted, right]).sum(axis=0).tolist()
        if not counted:
            return False
        self._last_validation = total / counted
        record = {"step": self.step, "validation_loss": self._last_validation, "backend": self.engine.backend}
        note = f"step {self.step}: validation loss {self._last_validation:.4f}"
        if classifies:
            self._last_accuracy = record["validation_accuracy"] = right / counted
            note += f", accuracy {self._last_accuracy:.2%} of {counted:,.0f}"
        if self.is_main_process:
            log.append(record)
        progress.note(note)
        return self.best.take(self.step, self._last_validation)

    def save(self, wait: bool = False) -> Path:
        """Writes a checkpoint of where the run stands, unless it is being written or on the disk already.

        It is written in the background, from a copy, and what goes wrong then ends the run at its next step; with
        `wait` it is on the disk when this returns.
        """
        target = checkpoints.path_of(self.run, self.step)
        there = (
            self.process_group.size > 1 or self._background.busy or target.is_dir()
        )  # several processes cannot all look
        if self._saved_step != self.step or not there:
            self._saved_step = self.step
            if self.is_main_process:
                self._background.wait()  # before the copy is made: two would be in memory
                self._background.start(partial(self._write, *self._snapshot()))
            elif self.config.training.sharded:
                self._snapshot()  # the first process puts the parts of all together
            else:
                self.process_group.average_statistics(self.engine.model)
            self._watch.beat()
        if wait:
            self._background.wait()
            if self.process_group.size > 1:
                with self._watch.resting():
                    self.process_group.gather(
                        [0.0]
                    )  # the end of one process ends the others: not before all is written
        return target

    def _snapshot(self) -> tuple[Any, ...]:
        """All that a checkpoint of this moment holds; numpy, which no later step changes."""
        state = {
            "loss_scale": asdict(self.scale),
            "best": asdict(self.best),
            "data": self.dataset.fingerprint,
            "facts": self.dataset.facts,
            "backend": self.engine.backend,
            "device": self.engine.device,
            "versions": versions(),
        }
        return self.step, self.config, self.engine.weights(), self.engine.optimizer_state(), state

    def _write(
        self, step: int, config: Config, weights: engine.Batch, optimizer: engine.Batch, state: dict[str, Any]
    ) -> None:
        wrong = next((name for name, array in weights.items() if not np.isfinite(array).all()), None)
        if wrong is not None:  # an update can overflow though loss and gradients did not
            raise IceNetError(
                f"step {step}: {wrong} is not finite; {self._last_good()}. Lower training.learning_rate"
            )
        best, keep = state["best"]["step"] if config.training.keep_best else None, config.training.keep_checkpoints
        path = checkpoints.save(self.run, config, step, weights, optimizer, state, keep, best, self.dataset.files)
        if step == best:
            link(self.run, path)
        tidy(self.run)
