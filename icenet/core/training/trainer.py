"""The training loop. It calls an `Engine` and imports no framework.

    trainer = Trainer.start(config, Path("runs/first"))        # or Trainer.resume(Path("runs/first"), ...)
    result = trainer.fit()

A step is a function of its number and of the state in the checkpoint. So a run that was killed and resumed has the
same result as an uninterrupted one, on the same backend bit for bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from icenet.core import backends, files
from icenet.core.config import Config, custom
from icenet.core.data.datasets import Dataset, dataset_for
from icenet.core.data.images.dataset import ImageDataset
from icenet.core.data.user import UserDataset
from icenet.core.distributed import processes, watchdog
from icenet.core.engine import Batch, Engine
from icenet.core.errors import IceNetError, UsageError
from icenet.core.families import sentence_transformers
from icenet.core.models import twins
from icenet.core.report.reporter import Reporter
from icenet.core.runs import checkpoint as checkpoints
from icenet.core.runs import run_folder
from icenet.core.runs.continuation import find_continuation
from icenet.core.runs.early_stopping import EarlyStopping
from icenet.core.tokenizers import tokenizer_files
from icenet.core.training import initial_weights
from icenet.core.training.checkpoint_writer import CheckpointWriter, last_good
from icenet.core.training.evaluation import evaluate
from icenet.core.training.given import Given
from icenet.core.training.loss_scale import LossScale
from icenet.core.training.notices import continuation, loss_twins, unused_keys
from icenet.core.training.own_folder import OwnFolder
from icenet.core.training.prefetch import Prefetch
from icenet.core.training.schedule import learning_rate
from icenet.core.training.signals import Interrupted, on_stop_signal
from icenet.core.training.skipped_steps import SkippedSteps
from icenet.core.weights.origin import Origin


@dataclass(frozen=True)
class Result:
    """The result of a call of `Trainer.fit`."""

    run: Path
    """Folder of the run."""
    step: int
    """Number of completed steps."""
    loss: float
    """Training loss of the last step with a finite one, in nats."""
    validation_loss: float | None
    """Validation loss of the last evaluation, in nats; None if there was none."""
    checkpoint: Path
    """The newest checkpoint."""
    plot: Path | None
    """The picture of the metrics; None if there is none (see `plot_problem`)."""
    validation_accuracy: float | None = None
    """Accuracy of a classifier in the last evaluation, from 0 to 1."""
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    """The best evaluation."""
    stopped_early: bool = False
    """Whether `training.early_stopping` ended the run."""
    plot_problem: str = ""
    """Why there is no plot."""


class PendingStep(NamedTuple):
    """A training step that was submitted to the engine, and whose result has not been read."""

    step: int
    learning_rate: float
    handle: Any
    """Result of `Engine.train_step`, for `Engine.read`."""
    data_wait: float
    """Seconds that the step waited for its batch."""


class Trainer:
    """Trains the model of one run. Create it with `start` or `resume`.

    These two write nothing. `fit` locks the run's folder first, then writes.
    """

    def __init__(
        self,
        config: Config,
        run: Path,
        engine: Engine,
        step: int,
        scale: LossScale,
        quiet: bool = False,
        given: Given | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.step = step
        """Number of completed steps."""
        self.scale = scale
        self.early_stopping = EarlyStopping()
        self.process_group = engine.process_group
        self.is_main_process = self.process_group.rank == 0
        """Whether this is the process that writes and prints: the only one, or the first of several."""
        self.quiet = quiet or not self.is_main_process
        given = given or Given()
        self.dataset: Dataset
        if given.data is not None:
            self.dataset = UserDataset(given.data, type(given.data).__name__, "")
            self.dataset.check(config.training.batch_size)
        else:
            self.dataset = processes.main_process_first(
                self.process_group, partial(dataset_for, config, quiet=self.quiet)
            )
        read: Callable[[int, int], Batch] = self.dataset.train_batch
        if isinstance(self.dataset, ImageDataset) and self.dataset.pixel_scale is not None:
            engine.pixel_scale, read = self.dataset.pixel_scale, self.dataset.train_pixels
        self._read_batch = read
        if given.loss is not None:
            engine.loss = given.loss
        self.notes = [*self.dataset.notes, *given.notes()]
        """Shown when `fit` begins."""
        if self.is_main_process:
            differences = [twins.compare_with_twin(config, engine.model)]
            differences.append(loss_twins.compare(config, engine, self.dataset) if given.loss is None else None)
            self.notes += [line for line in differences if line]
        # read once: a continued run has them in a checkpoint, which is removed at some time
        self._layers = sentence_transformers.dense_files(config.embedding)
        self._writer = CheckpointWriter(run, config, engine, self.dataset, step or None, given.names(), self._layers)
        self._watchdog = watchdog.Watchdog(self.process_group, run)
        self._folder = OwnFolder(run, self.process_group)
        self._stop_signal: str | None = None
        self._skipped = SkippedSteps(config.training)
        self._last_loss = math.nan
        self._last_validation_loss: float | None = None
        self._last_accuracy: float | None = None

    @property
    def run(self) -> Path:
        """The folder of the run. With `numbered`, `fit` adds the number to its name."""
        return self._folder.path

    @classmethod
    def start(
        cls,
        config: Config,
        run: str | Path,
        *,
        numbered: bool = False,
        backend: str | None = None,
        device: str | None = None,
        quiet: bool = False,
        data: Any = None,
        loss: Callable[..., Any] | None = None,
    ) -> Trainer:
        """Returns the trainer of a new run.

        Args:
            config: The configuration.
            run: Folder of the run. It must not contain files that the run would replace.
            numbered: Whether to use RUN-2, RUN-3, ... if the folder exists. `fit` chooses it.
            backend, device: Override those of the configuration.
            quiet: Show no progress.
            data: A data set in place of that of the configuration: an object with the methods of a class that
                `data.kind` names (docs/data.md).
            loss: A loss in place of that of the configuration, for the backend of the run: (output, batch) -> mean.

        Raises:
            UsageError: `config` is no Config; or the folder contains a run, a checkpoint, a model, or files with the
                names of a run's.
            CheckpointError: Another process trains a run there.
        """
        if not isinstance(config, Config):
            raise UsageError(
                f"Trainer.start: needs a Config, not {type(config).__name__}; Config.from_yaml reads a file or preset"
            )
        run = files.user_path(run, "Trainer.start")
        config = config.checked()
        if not numbered:
            run_folder.check_free(run)
        custom.trust_all(config)
        trainer = cls._new(config, run, backend, device, quiet, Given(data, loss))
        trainer._folder.is_new, trainer._folder.is_numbered = True, numbered
        return trainer

    @classmethod
    def _new(
        cls, config: Config, run: Path, backend: str | None, device: str | None, quiet: bool, given: Given
    ) -> Trainer:
        if backend is not None:
            backends.check_name(backend)
        # the run's config.yaml records the backend, so that --resume alone continues on it
        config = config.with_overrides(f"backend={backend or config.backend}")
        engine = backends.engine(config, None, device)
        notes = initial_weights.apply(config, engine)
        trainer = cls(config, run, engine, 0, LossScale.for_precision(config.training.mixed_precision), quiet, given)
        trainer.notes += [*notes, *initial_weights.image_notes(config, trainer.dataset.facts)]
        trainer.notes += initial_weights.facts_for(config, trainer.dataset)
        initial_weights.files_for(config, trainer.dataset)
        return trainer

    @classmethod
    def resume(
        cls,
        path: str | Path,
        *,
        run: str | Path | None = None,
        overrides: Sequence[str] = (),
        backend: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        quiet: bool = False,
        data: Any = None,
        loss: Callable[..., Any] | None = None,
    ) -> Trainer:
        """Returns a trainer that continues a run from its newest intact checkpoint, or from a given checkpoint.

        Args:
            path: Folder of the run, or a checkpoint.
            run: Another folder for the continuation; the original run is unchanged.
            overrides: `key=value` changes of the configuration.
            backend, device: Override those of the run.
            dtype: Dtype of parameters and computation; float64 is for PyTorch on the CPU only.
            quiet: Show no progress.
            data, loss: As in `start`; required if the run was started with them.

        Raises:
            UsageError: See `find_continuation`; or the run was started with `data` or `loss`, and they are missing.
            CheckpointError: There is no intact checkpoint.
        """
        if backend is not None:
            backends.check_name(backend)
        path = files.user_path(path, "Trainer.resume")
        run = None if run is None else files.user_path(run, "Trainer.resume")
        plan = find_continuation(path, run, overrides, backend)
        config, found = plan.config, plan.found
        given = Given(data, loss)
        if found is None:
            trainer = cls._new(config, plan.run, backend, device, quiet, given)
            trainer._folder.is_new = plan.run.resolve() != path.resolve()
            trainer.notes += plan.notes
            return trainer
        given.check(found.state.get("given"), str(found.path))
        engine = backends.engine(config, None, device, dtype=dtype)
        twins.check_same_model(found.state, engine.model, str(found.path))
        engine.set_weights(dict(found.weights))
        engine.model.origin = Origin.of(found.weights)
        engine.set_optimizer_state(dict(found.optimizer))
        scale = LossScale.of_checkpoint(found, config)
        trainer = cls(config, plan.run, engine, found.step, scale, quiet, given)
        trainer.notes += plan.notes
        if isinstance(trainer.dataset, UserDataset) and not trainer.dataset.facts:
            trainer.dataset.facts = dict(found.state.get("facts") or {})  # of the model that the run began with
        if isinstance(trainer.dataset, UserDataset) and not trainer.dataset.files:
            trainer.dataset.files = tokenizer_files(str(found.path))  # of that model, too
        trainer._folder.branched_from = plan.branched_from
        trainer._folder.is_new = plan.branched_from is not None
        if plan.branched_from is not None:
            trainer._writer.saved_step = None  # the new folder has no checkpoint
        else:
            trainer.early_stopping = EarlyStopping.of_checkpoint(found, config, plan.run)
        trainer.notes += continuation.notes(found, config, engine, trainer.dataset)
        return trainer

    def fit(self, until: int | None = None) -> Result:
        """Trains to `training.max_steps`, or to step `until`, and saves the state.

        Raises:
            Interrupted: Ctrl-C, SIGTERM or SIGHUP. The state was saved.
            IceNetError: The loss is not finite, or a checkpoint could not be written.
        """
        training = self.config.training
        last_step = min(training.max_steps, until or training.max_steps)
        self._stop_signal = self.process_group.stop = None
        engine = self.engine
        place = unused_keys.Circumstances(
            engine.backend, engine.device, engine.tf32, self.process_group.size, engine.optimizer.assigned
        )
        unused = unused_keys.notices(self.config, self.dataset, place)
        self._check_agreement()
        self._folder.create()
        self._writer.run = self.run
        reporter = self._reporter()
        self._watchdog = watchdog.Watchdog(self.process_group, self.run)
        lost_processes = processes.explain_lost_processes(self.process_group, self.run)
        with self._folder.locked(), on_stop_signal(self._request_stop), reporter, self._watchdog, lost_processes:
            try:
                with self._writer:
                    stopped_early = self._begin(last_step, reporter, unused)
            except BaseException:
                reporter.notes(self._folder.remove_without_steps())
                raise
            finally:
                self._folder.remember_checkpoints()
        plot, plot_problem = reporter.draw_plot()
        return Result(
            run=self.run,
            step=self.step,
            loss=self._last_loss,
            validation_loss=self._last_validation_loss,
            checkpoint=checkpoints.path_of(self.run, self.step),
            plot=plot,
            plot_problem=plot_problem,
            validation_accuracy=self._last_accuracy,
            early_stopping=self.early_stopping,
            stopped_early=stopped_early,
        )

    def _reporter(self) -> Reporter:
        training = self.config.training
        return Reporter(
            self.run,
            training,
            self.step,
            backend=self.engine.backend,
            device=self.engine.device,
            tf32=self.engine.tf32,
            unit=self.dataset.unit,
            items_per_step=training.batch_size * self.dataset.items_per_row,
            is_main_process=self.is_main_process,
            quiet=self.quiet,
        )

    def _begin(self, last_step: int, reporter: Reporter, unused: list[str]) -> bool:
        """Prepares the locked folder, shows the notes and trains. Returns whether early stopping ended the run."""
        self._prepare_run_folder(reporter)
        repeated = reporter.begin(self.step)
        for line in self.dataset.summary:
            reporter.note(line)
        reporter.notes([*self.notes, *unused, *repeated])
        if self.notes:  # not again in a second call
            reporter.record_notes(self.step, self.dataset.notes)
        self.notes.clear()
        batch_size, ahead = self.config.training.batch_size, not isinstance(self.dataset, UserDataset)
        with Prefetch(lambda step: self._read_batch(step, batch_size), last_step, ahead) as data:
            return self._train(last_step, reporter, data)

    def _train(self, last_step: int, reporter: Reporter, data: Prefetch) -> bool:
        """Runs the training loop. Returns whether early stopping ended it."""
        training = self.config.training
        # The result of a step is read while the device computes the next one, unless the next one depends on it.
        read_late = training.mixed_precision != "fp16" and training.on_nan == "stop"
        pending: PendingStep | None = None
        while self.step < last_step:
            reporter.start_step()
            self._watchdog.beat()
            self._writer.check()

            rate = learning_rate(self.step, training)
            batch = data.batch(self.step)
            handle = self.engine.train_step(batch, self.step, rate, self.scale.scale)
            submitted = PendingStep(self.step, rate, handle, data.waited)
            self.step += 1  # immediately: an error from here on must not repeat the step
            if pending is not None:
                self._read_step(pending, reporter)
            pending = submitted

            is_last = self.step == last_step
            evaluate = training.eval_every is not None and (self.step % training.eval_every == 0 or is_last)
            save = self.step % training.checkpoint_every == 0 or is_last or self._stop_signal is not None
            if evaluate or save or not read_late:
                self._read_step(pending, reporter)
                pending = None

            stop_early = False
            if evaluate:
                is_best = self._evaluate(reporter)
                save = save or (is_best and training.keep_best)
                stop_early = self.early_stopping.should_stop(training.early_stopping) and not is_last
            if save or stop_early:
                self.save(wait=stop_early)
            if stop_early:
                reporter.note(f"step {self.step}: stopped early: {self.early_stopping.reason}")
                return True
            if self._stop_signal is not None and self.step < training.max_steps:
                if pending is not None:
                    self._read_step(pending, reporter)
                self.save(wait=True)  # the signal may have come after `save` was decided
                trust = " --trust-code" if custom.references(self.config) else ""
                raise Interrupted(
                    self._stop_signal,
                    f" after step {self.step}; everything is saved: icenet train --resume {self.run}{trust}",
                )
        self.save(wait=True)  # waits for the last checkpoint, and repeats one that could not be written before
        return False

    def _read_step(self, pending: PendingStep, reporter: Reporter) -> None:
        """Waits for the result of a step, checks and reports it."""
        result = self.engine.read(pending.handle)
        step = pending.step + 1
        self._stop_signal = self._stop_signal or result.stop
        if not result.finite:
            batch = self.dataset.train_batch(pending.step, self.config.training.batch_size)
            self.engine.check_embeddings(batch, pending.step)
        if not self._skipped.count(result, self.scale.scale):
            with contextlib.suppress(IceNetError):
                self._writer.wait()  # the checkpoint that is being written may be the last good one
            raise self._skipped.error(step, result, last_good(self.run))
        is_fp16 = self.config.training.mixed_precision == "fp16"
        if is_fp16:
            self.scale.update(result.finite)
        if math.isfinite(result.loss):
            self._last_loss = result.loss
        reporter.log_step(
            step,
            result.loss,
            pending.learning_rate,
            result.grad_norm,
            pending.data_wait,
            loss_scale=self.scale.scale if is_fp16 else None,
            skipped=not result.finite if is_fp16 or not result.finite else None,
        )

    def _evaluate(self, reporter: Reporter) -> bool:
        """Evaluates the model and reports the result. Returns whether it is the best so far."""
        training = self.config.training
        batches = self.dataset.validation_batches(training.batch_size, training.eval_batches)
        found = evaluate(self.engine, batches, self._watchdog.beat)
        if found is None:
            return False
        self._last_validation_loss = found.loss
        if found.accuracy is not None:
            self._last_accuracy = found.accuracy
        reporter.log_evaluation(self.step, found.loss, found.accuracy, found.num_labels)
        return self.early_stopping.update(self.step, found.loss)

    def save(self, wait: bool = False) -> Path:
        """Writes a checkpoint of the current step in the background, unless there is one.

        An error is raised at the next step. With `wait` the checkpoint is complete when this returns.

        Returns:
            The path of the checkpoint.
        """
        if not self._writer.is_saved(self.step):
            self._writer.start(self.step, self.scale, self.early_stopping)
            self._watchdog.beat()
        if wait:
            self._writer.wait()
            if self.process_group.size > 1:
                with self._watchdog.paused():
                    self.process_group.gather([0.0])  # a launcher ends all processes when the first of them ends
        return checkpoints.path_of(self.run, self.step)

    def _prepare_run_folder(self, reporter: Reporter) -> None:
        """Brings the locked folder to the state from which training continues. Raises as `OwnFolder.check`."""
        self.notes += self._folder.check()
        if self._folder.branched_from is not None:
            self.save(wait=True)  # first: a branch that is killed can then be resumed without its origin
            reporter.copy_history(self._folder.branched_from, self.step)
            self._folder.branched_from = None
        if self.is_main_process:
            best = self.early_stopping.step if self.config.training.keep_best else None
            self.notes += run_folder.prepare(
                self.run, self.config, {**self.dataset.files, **self._layers}, self.step, best
            )

    def _check_agreement(self) -> None:
        """Checks that all processes have the same step, config and data, before the first one writes."""
        if self.process_group.size > 1:
            found = {"step": str(self.step), "config": self.config.to_yaml(), "data": str(self.dataset.fingerprint)}
            processes.check_same(self.process_group, found)

    def _request_stop(self, signal: str) -> None:
        if self.process_group.size > 1:
            self.process_group.stop = signal  # the result of the next step reports it to all processes
        else:
            self._stop_signal = signal
