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
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icenet.core import backend as backends
from icenet.core import checkpoint as checkpoints
from icenet.core import custom, plots, staging
from icenet.core.config import Config
from icenet.core.data import dataset_for
from icenet.core.errors import CheckpointError, IceNetError, UsageError
from icenet.core.precision import LossScale
from icenet.core.report import MetricsLog, Progress
from icenet.core.runs import killed_at_birth, locked, run_of, versions
from icenet.core.schedule import learning_rate


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


_ITEMS = {"tok": "tokens", "img": "images"}


class Trainer:
    """A run folder, an engine and the loop between them. Make one with `start` or `resume`.

    Those only read; `fit` writes, when it has the run to itself.
    """

    def __init__(
        self, config: Config, run: Path, engine: backends.Engine, step: int, scale: LossScale, quiet: bool = False
    ) -> None:
        self.config = config
        self.run = run
        self.engine = engine
        self.step = step
        """Steps done."""
        self.scale = scale
        self.quiet = quiet
        self.dataset = dataset_for(config)
        self.notes: list[str] = []
        self._branched_from: Path | None = None
        self._present = checkpoints.list_checkpoints(run)
        self._saved_step = step if step else -1
        self._last_loss = math.nan
        self._last_validation: float | None = None
        self._last_accuracy: float | None = None
        self._stop: int | None = None

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
        if checkpoints.list_checkpoints(run) or (run / "metrics.jsonl").exists():
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
        """Continues a run (its newest good checkpoint) or a checkpoint, on either backend.

        With `run` the continuation goes to another folder, and the run it came from stays as it is. A
        checkpoint that is not its run's newest needs one.
        """
        if killed_at_birth(path):
            config = Config.from_yaml(path / "config.yaml", overrides, trust_code=False)
            trainer = cls._fresh(config, run or path, backend, device, quiet)
            trainer.notes = [f"{path}: ended before its first checkpoint; it begins again at step 1"]
            return trainer
        notes: list[str] = []
        found = checkpoints.find(path, notes.append)
        origin = run_of(found.path)
        target = run or origin
        if target is None:
            raise UsageError(f"{path}: lies in no run's folder; say with --run NEW where to continue")
        branch = origin is None or target.resolve() != origin.resolve()
        if not branch:
            newer = [other.name for other in checkpoints.list_checkpoints(target, found.step)]
            if newer and path.resolve() == found.path.resolve():
                raise UsageError(
                    f"{path}: the run went on to {newer[-1]}; resume {target} to continue there, "
                    "or give --run NEW to branch off here"
                )
        elif checkpoints.list_checkpoints(target) or (target / "metrics.jsonl").exists():
            raise UsageError(f"{target}: holds a run already; choose another --run for the continuation")
        config = found.config.with_overrides(*overrides, *([f"backend={backend}"] if backend else []))
        if found.step >= config.training.max_steps:
            raise UsageError(
                f"{path}: the run is complete at step {found.step}; "
                f"to go on: --set training.max_steps={2 * found.step}"
            )
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
        trainer = cls(config, target, engine, found.step, scale, quiet)
        trainer.notes = notes
        trainer._branched_from = (origin or found.path) if branch else None
        if found.state.get("data") != trainer.dataset.fingerprint:
            held = "images" if trainer.dataset.unit == "img" else "text"
            notes.append(f"the {held} of data.source {config.data.source} is not what the checkpoint was trained on")
        return trainer

    def _make_folder(self) -> None:
        try:
            self.run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.run}: cannot be written ({error.strerror}); choose another --run") from None

    def _settle(self, log: MetricsLog) -> None:
        """Puts the folder in the state from which training goes on; only when the run is locked."""
        if checkpoints.list_checkpoints(self.run) != self._present:
            raise CheckpointError(f"{self.run}: another process went on with this run meanwhile; resume it again")
        if self._branched_from is not None:
            self.save()  # first: a branch that is killed can then be resumed without its origin
            self._copy_metrics(self._branched_from)
            self._branched_from = None
        for unread in checkpoints.list_checkpoints(self.run, self.step):
            self.notes.append(f"{unread.name} is kept as {checkpoints.set_aside(unread).name}")
        staging.write_text(self.run / "config.yaml", self.config.to_yaml())
        log.truncate_after(self.step)

    def _copy_metrics(self, origin: Path) -> None:
        if (origin / "metrics.jsonl").is_file():
            with MetricsLog(self.run / "metrics.jsonl") as log:
                for record in MetricsLog.read(origin / "metrics.jsonl"):
                    if record.get("step", 0) <= self.step:
                        log.append(record)

    # ---- the loop ----------------------------------------------------------------------------------------

    def fit(self, until: int | None = None) -> Result:
        """Trains to `training.max_steps`, or to step `until`; the state is saved when it returns.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the state was saved.
            IceNetError: the loss is not a number, or a checkpoint could not be written.
        """
        training = self.config.training
        last = min(training.max_steps, until or training.max_steps)
        items = training.batch_size * self.dataset.items_per_row
        log = MetricsLog(self.run / "metrics.jsonl")
        self._make_folder()
        with (
            locked(self.run),
            log,
            self._signals(),
            Progress(training.max_steps, self.step, tokens_per_step=items, unit=self.dataset.unit, quiet=self.quiet,
                     label=f"{self.engine.backend} {self.engine.device}") as progress,
        ):  # fmt: skip
            self._settle(log)
            for note in self.notes:
                (logging.getLogger("icenet").warning if self.quiet else progress.note)(note)
            self.notes.clear()
            try:
                self._run(last, log, progress)
            finally:
                self._present = checkpoints.list_checkpoints(self.run)
        checkpoint = self.run / "checkpoints" / f"step-{self._saved_step:08d}"
        plot = plots.plot_metrics(MetricsLog.read(log.path), self.run / "plot.png", title=self.run.name)
        return Result(
            self.run, self.step, self._last_loss, self._last_validation, checkpoint, plot, self._last_accuracy
        )

    def _run(self, last: int, log: MetricsLog, progress: Progress) -> None:
        training = self.config.training
        pending: tuple[int, float, float, Any] | None = None
        began = time.perf_counter()
        while self.step < last:
            step, rate = self.step, learning_rate(self.step, training)
            batch = self.dataset.train_batch(step, training.batch_size)
            handle = self.engine.train_step(batch, step, rate, self.scale.scale)
            if pending is not None:  # the device works on this step while the host looks at the last one
                self._record(pending, log, progress)
            pending = (step, rate, began, handle)
            began = time.perf_counter()
            self.step = done = step + 1
            evaluates = training.eval_every is not None and (done % training.eval_every == 0 or done == last)
            saves = done % training.checkpoint_every == 0 or done == last or self._stop is not None
            if evaluates or saves or training.mixed_precision == "fp16":
                self._record(pending, log, progress)
                pending = None
            if evaluates:
                self._evaluate(log, progress)
            if saves:
                self.save()
            if evaluates or saves:
                began = time.perf_counter()
            if self._stop is not None and done < training.max_steps:
                if pending is not None:
                    self._record(pending, log, progress)
                self.save()  # the signal may have come after `saves` was decided
                name = signal.Signals(self._stop).name
                raise Interrupted(
                    f"stopped by {'Ctrl-C' if name == 'SIGINT' else name} after step {done}; "
                    f"everything is saved: icenet train --resume {self.run}"
                )

    def _record(self, pending: tuple[int, float, float, Any], log: MetricsLog, progress: Progress) -> None:
        step, rate, began, handle = pending
        result = self.engine.read(handle)
        elapsed = time.perf_counter() - began
        done = step + 1
        fp16 = self.config.training.mixed_precision == "fp16"
        if not math.isfinite(result.loss) or not (result.finite or fp16):
            raise IceNetError(
                f"step {done}: the loss is {result.loss} and the gradient norm {result.grad_norm}; "
                f"{self._last_good()}. "
                "Lower training.learning_rate, or raise training.warmup_steps"
            )
        if fp16:
            self.scale.update(result.finite)
        self._last_loss = result.loss
        speed = self.config.training.batch_size * self.dataset.items_per_row / max(elapsed, 1e-9)
        log.append(
            {
                "step": done,
                "loss": result.loss,
                "learning_rate": rate,
                "grad_norm": result.grad_norm,
                f"{_ITEMS[self.dataset.unit]}_per_second": round(speed, 1),
                "backend": self.engine.backend,
                **({"loss_scale": self.scale.scale, "skipped": not result.finite} if fp16 else {}),
            }
        )
        progress.update(done, result.loss, learning_rate=rate, tokens_per_second=speed)

    def _last_good(self) -> str:
        newest = checkpoints.newest(self.run)
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"

    def _evaluate(self, log: MetricsLog, progress: Progress) -> None:
        training = self.config.training
        total = counted = 0.0
        correct: int | None = None
        for batch in self.dataset.validation_batches(training.batch_size, training.eval_batches):
            found = self.engine.evaluate(batch)
            total, counted = total + found.loss * found.labels, counted + found.labels
            if found.correct is not None:
                correct = (correct or 0) + found.correct
        if not counted:
            return
        self._last_validation = total / counted
        record = {"step": self.step, "validation_loss": self._last_validation, "backend": self.engine.backend}
        note = f"step {self.step}: validation loss {self._last_validation:.4f}"
        if correct is not None:
            self._last_accuracy = record["validation_accuracy"] = correct / counted
            note += f", accuracy {self._last_accuracy:.2%} of {counted:,.0f}"
        log.append(record)
        progress.note(note)

    def save(self) -> Path:
        """Writes a checkpoint of where the run stands, unless it is on the disk already."""
        target = self.run / "checkpoints" / f"step-{self.step:08d}"
        if self._saved_step == self.step and target.is_dir():
            return target
        state = {
            "loss_scale": asdict(self.scale),
            "data": self.dataset.fingerprint,
            "facts": self.dataset.facts,
            "backend": self.engine.backend,
            "device": self.engine.device,
            "versions": versions(),
        }
        weights = self.engine.weights()
        wrong = next((name for name, array in weights.items() if not np.isfinite(array).all()), None)
        if wrong is not None:  # an update can overflow though loss and gradients did not
            raise IceNetError(
                f"step {self.step}: {wrong} is not finite; {self._last_good()}. Lower training.learning_rate"
            )
        path = checkpoints.save(
            self.run,
            self.config,
            self.step,
            weights,
            self.engine.optimizer_state(),
            state,
            self.config.training.keep_checkpoints,
        )
        self._saved_step = self.step
        return path

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step in hand; a second Ctrl-C ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            self._stop = number
            signal.signal(number, previous[signal.Signals(number)])

        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in previous:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
