"""The one training loop. It talks to an Engine and knows no framework.

    trainer = Trainer.start(config, Path("runs/first"))        # or Trainer.resume(Path("runs/first"), ...)
    result = trainer.fit()

Everything in a step is a function of the step's number and the state in the checkpoint, so a run that was
killed and resumed ends where the uninterrupted one does, and on the same backend bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from icenet.core import backend as backends
from icenet.core import checkpoint as checkpoints
from icenet.core import plots
from icenet.core.config import Config
from icenet.core.data import dataset_for
from icenet.core.errors import CheckpointError, IceNetError, UsageError
from icenet.core.precision import LossScale
from icenet.core.report import MetricsLog, Progress
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


def new_run_folder(config: str) -> Path:
    """A folder for a new run of a config, named after it: runs/NAME, or runs/NAME-2 where that is taken."""
    base = Path("runs") / Path(config).stem
    number, folder = 1, base
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


class Trainer:
    """A run folder, an engine and the loop between them. Make one with `start` or `resume`."""

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
        self._saved_step = step if step else -1
        self._last_loss = math.nan
        self._last_validation: float | None = None
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
        engine = backends.engine(config, backend, device)
        trainer = cls(config, run, engine, 0, LossScale.for_precision(config.training.mixed_precision), quiet)
        trainer._write_config()
        return trainer

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
        notes: list[str] = []
        found = checkpoints.find(path, notes.append)
        origin = found.path.parent.parent
        if run is None or run.resolve() == origin.resolve():
            run = origin
            newer = [other.name for other in checkpoints.list_checkpoints(run) if other.name > found.path.name]
            if newer and path.resolve() == found.path.resolve():
                raise UsageError(
                    f"{path}: the run went on to {newer[-1]}; resume {run} to continue there, "
                    "or give --run NEW to branch off here"
                )
        elif checkpoints.list_checkpoints(run) or (run / "metrics.jsonl").exists():
            raise UsageError(f"{run}: holds a run already; choose another --run for the continuation")
        config = found.config.with_overrides(*overrides) if overrides else found.config
        if found.step >= config.training.max_steps:
            raise UsageError(
                f"{path}: the run is complete at step {found.step}; "
                f"to go on: --set training.max_steps={2 * found.step}"
            )
        engine = backends.engine(config, backend, device, dtype=dtype)
        engine.set_weights(dict(found.weights))
        engine.set_optimizer_state(dict(found.optimizer))
        scale = LossScale.for_precision(config.training.mixed_precision)
        stored = found.state.get("loss_scale")
        if isinstance(stored, dict) and config.training.mixed_precision == found.config.training.mixed_precision:
            scale = LossScale(float(stored["scale"]), int(stored["good_steps"]))
        trainer = cls(config, run, engine, found.step, scale, quiet)
        trainer.notes = notes
        if found.state.get("data") != trainer.dataset.fingerprint:
            notes.append(f"the text of data.source {config.data.source} is not what the checkpoint was trained on")
        if run == origin:
            checkpoints.drop_after(run, found.step)
        else:
            trainer._copy_metrics(origin)
        trainer._write_config()
        return trainer

    def _write_config(self) -> None:
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            (self.run / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{self.run}: cannot be written ({error.strerror}); choose another --run") from None

    def _copy_metrics(self, origin: Path) -> None:
        if (origin / "metrics.jsonl").is_file():
            self.run.mkdir(parents=True, exist_ok=True)
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
        log.truncate_after(self.step)
        with (
            _locked(self.run),
            log,
            self._signals(),
            Progress(training.max_steps, self.step, tokens_per_step=items, quiet=self.quiet,
                     label=f"{self.engine.backend} {self.engine.device}") as progress,
        ):  # fmt: skip
            for note in self.notes:
                progress.note(note)
            self._run(last, log, progress)
        checkpoint = self.run / "checkpoints" / f"step-{self._saved_step:08d}"
        plot = plots.plot_metrics(MetricsLog.read(log.path), self.run / "plot.png", title=self.run.name)
        return Result(self.run, self.step, self._last_loss, self._last_validation, checkpoint, plot)

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
            if self._stop is not None and done < last:
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
            newest = checkpoints.newest(self.run)
            where = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
            raise IceNetError(
                f"step {done}: the loss is {result.loss} and the gradient norm {result.grad_norm}; {where}. "
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
                "tokens_per_second": round(speed, 1),
                "backend": self.engine.backend,
                **({"loss_scale": self.scale.scale, "skipped": not result.finite} if fp16 else {}),
            }
        )
        progress.update(done, result.loss, learning_rate=rate, tokens_per_second=speed)

    def _evaluate(self, log: MetricsLog, progress: Progress) -> None:
        training = self.config.training
        total = counted = 0.0
        for batch in self.dataset.validation_batches(training.batch_size, training.eval_batches):
            loss, count = self.engine.evaluate(batch)
            total, counted = total + loss * count, counted + count
        if counted:
            self._last_validation = total / counted
            log.append({"step": self.step, "validation_loss": self._last_validation, "backend": self.engine.backend})
            progress.note(f"step {self.step}: validation loss {self._last_validation:.4f}")

    def save(self) -> Path:
        """Writes a checkpoint of where the run stands, unless it is on the disk already."""
        target = self.run / "checkpoints" / f"step-{self.step:08d}"
        if self._saved_step == self.step and target.is_dir():
            return target
        state = {
            "loss_scale": asdict(self.scale),
            "data": self.dataset.fingerprint,
            "backend": self.engine.backend,
            "device": self.engine.device,
            "versions": versions(),
        }
        path = checkpoints.save(
            self.run,
            self.config,
            self.step,
            self.engine.weights(),
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


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """One process at a time works on a run; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    handle = os.open(run / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"{run}: another process trains this run; wait for it, or choose another --run"
            ) from None
        yield
    finally:
        os.close(handle)


def versions() -> dict[str, str]:
    """The versions of what a run's numbers depend on, of the packages that are installed."""
    found = {}
    for name in ("icenet", "mlx", "torch", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
