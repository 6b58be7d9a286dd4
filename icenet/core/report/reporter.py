"""Reports a training run: metrics.jsonl, TensorBoard events, the progress bar and plot.png."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from icenet.core.config.training import TrainingConfig
from icenet.core.report import canvas, plots
from icenet.core.report.metrics import MetricsLog
from icenet.core.report.progress import Progress
from icenet.core.report.tensorboard import FOLDER, TensorBoardLog

METRICS = "metrics.jsonl"
_ITEMS = {"tok": "tokens", "img": "images", "row": "rows"}


class Reporter:
    """Reports the steps and evaluations of one call of `Trainer.fit`.

        with Reporter(run, training, 0, backend="mlx", device="cpu", unit="tok", items_per_step=2048) as reporter:
            reporter.begin(0)
            for step in range(1, 101):
                reporter.start_step()
                ...
                reporter.log_step(step, loss, learning_rate, grad_norm)

    Of several processes only the first one reports; in the others every method does nothing.
    """

    def __init__(
        self,
        run: Path,
        training: TrainingConfig,
        step: int,
        *,
        backend: str,
        device: str,
        tf32: str = "off",
        unit: str,
        items_per_step: int,
        is_main_process: bool = True,
        quiet: bool = False,
    ) -> None:
        """
        Args:
            run: Folder of the run.
            training: The section `training` of the configuration.
            step: Number of completed steps.
            backend, device: Names to record and show.
            tf32: `on` if fp32 products are computed in TF32, otherwise `off`.
            unit: `tok`, `img` or `row`.
            items_per_step: Tokens or images in one step.
            is_main_process: Whether this process reports.
            quiet: Show no progress. Notes go to the logger `icenet`.

        Raises:
            UsageError: `training.tensorboard` is set and tensorboard is not installed.
        """
        self.run = run
        self.backend = backend
        self.tf32 = tf32
        self.is_main_process = is_main_process
        self.quiet = quiet or not is_main_process
        self._unit = unit
        self._items_per_step = items_per_step
        self._board = TensorBoardLog(run / FOLDER) if training.tensorboard and is_main_process else None
        self._log = MetricsLog(run / METRICS, mirror=self._board)
        self._progress = Progress(
            training.max_steps,
            step,
            tokens_per_step=items_per_step,
            unit=unit,
            quiet=self.quiet,
            label=f"{backend} {device}" + (" TF32" if tf32 == "on" else ""),
        )
        self._iteration_start = 0.0
        self._step_seconds = 0.0

    def __enter__(self) -> Reporter:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._progress.__exit__(kind, error, trace)
        finally:
            self._log.close()

    def copy_history(self, origin: Path, step: int) -> None:
        """Copies the metrics of another run, or of none for a lone checkpoint, up to a step."""
        if self.is_main_process:
            MetricsLog.copy(origin / METRICS, self._log.path, step)

    def begin(self, step: int) -> list[str]:
        """Sets the metrics after `step` aside, which will be written again, and opens TensorBoard's file.

        Returns:
            Notes for the user.
        """
        notes = []
        if self.is_main_process and (count := self._log.truncate_after(step)):
            steps = "1 step" if count == 1 else f"{count:,} steps"
            notes.append(
                f"{steps} after step {step} without a checkpoint will be repeated; their metrics are kept in "
                f"{Path(METRICS).stem}-replaced.jsonl"
            )
        if self._board is not None:
            self._board.begin(step, MetricsLog.read(self._log.path) if self._log.path.exists() else ())
        return notes

    def notes(self, notes: Sequence[str]) -> None:
        """Shows notes on how the run begins. If quiet, they are warnings of the logger `icenet`."""
        if self.is_main_process:
            for note in notes:
                (logging.getLogger("icenet").warning if self.quiet else self._progress.note)(note)

    def record_notes(self, step: int, notes: Sequence[str]) -> None:
        """Writes notes to the metrics, with the step after which they were made."""
        if self.is_main_process:
            for note in notes:
                self._log.append({"step": step, "note": note})

    def note(self, text: str) -> None:
        """Shows a line, unless quiet."""
        self._progress.note(text)

    def start_step(self) -> None:
        """Starts the clock of a step, at the beginning of an iteration of the loop."""
        self._iteration_start, self._step_seconds = time.perf_counter(), 0.0

    def log_step(
        self,
        step: int,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        data_wait: float = 0.0,
        *,
        loss_scale: float | None = None,
        skipped: bool | None = None,
    ) -> None:
        """Records a step, also the seconds that it waited for its batch; None leaves a key out.

        The time of a step is the time of one iteration of the training loop, also on an asynchronous device. If an
        iteration reads two results, both have its time, or the second one its own waiting time if that is longer.
        """
        if not self.is_main_process:
            return
        now = time.perf_counter()
        self._step_seconds, self._iteration_start = max(now - self._iteration_start, self._step_seconds), now
        speed = self._items_per_step / max(self._step_seconds, 1e-9)
        record = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            f"{_ITEMS[self._unit]}_per_second": round(speed, 1),
            "data_wait": round(data_wait, 6),
            "backend": self.backend,
            "tf32": self.tf32,
            "loss_scale": loss_scale,
            "skipped": skipped,
        }
        self._log.append({key: value for key, value in record.items() if value is not None})
        self._progress.update(step, loss, learning_rate=learning_rate, tokens_per_second=speed)

    def log_evaluation(self, step: int, loss: float, accuracy: float | None, count: float) -> None:
        """Records an evaluation over `count` labels; `accuracy` is that of a classifier."""
        record = {"step": step, "validation_loss": loss, "backend": self.backend}
        note = f"step {step}: validation loss {loss:.4f}"
        if accuracy is not None:
            record["validation_accuracy"] = accuracy
            note += f", accuracy {accuracy:.2%} of {count:,.0f}"
        if self.is_main_process:
            self._log.append(record)
        self.note(note)

    def draw_plot(self) -> tuple[Path | None, str]:
        """Draws the metrics to plot.png. A plot that cannot be drawn is no error, because the run is complete.

        Returns:
            The path and an empty text, or None and the reason why there is no plot.
        """
        if not self.is_main_process:
            return None, "another process draws it"
        return canvas.attempt(
            lambda: plots.plot_metrics(MetricsLog.read(self._log.path), self.run / "plot.png", title=self.run.name)
        )
