"""What a run tells: a line of JSON for each step, and progress on the screen. Pictures are in `plots`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from icenet.core.errors import IceNetError
from icenet.core.plots import plot_metrics, plot_parity

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

__all__ = ["MetricsLog", "Progress", "plot_metrics", "plot_parity"]

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """A file of metrics, one JSON object a line, each line flushed as it is written.

    JSON has no NaN and no infinity: they are written as the strings "NaN", "Infinity" and "-Infinity" (the
    convention of Protocol Buffers' JSON), and `read` gives them back as numbers. A line that a kill or a
    power cut left unfinished is passed over in reading and removed before anything is appended.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: IO[str] | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record; numpy scalars become plain numbers.

        Raises:
            IceNetError: the file cannot be written.
        """
        line = json.dumps(_plain(record), allow_nan=False) + "\n"
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _mend_tail(self.path)
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def truncate_after(self, step: int) -> None:
        """Drops the records of steps after `step`, and unfinished lines: what a resumed run writes again.

        The file is replaced in one move. Nothing happens where it is not there.

        Raises:
            IceNetError: the file cannot be written.
        """
        self.close()
        temporary = self.path.with_name(self.path.name + ".tmp")
        try:
            if not self.path.exists():
                return
            kept = [record for record in self.read(self.path) if record.get("step", step) <= step]
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(_plain(record), allow_nan=False) + "\n" for record in kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            raise self._unwritable(error) from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """The records of a file, in order; lines that are no JSON object are passed over.

        Raises:
            IceNetError: the file cannot be read.
        """
        try:
            lines = Path(path).read_bytes().split(b"\n")
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise IceNetError(f"cannot read the metrics {path}: {reason}") from None
        records = []
        for line in lines:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    records.append(_numbers(record))
        return records

    def close(self) -> None:
        """Closes the file; the next `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unwritable(self, error: OSError) -> IceNetError:
        reason = (error.strerror or str(error)).lower()
        return IceNetError(
            f"cannot write the metrics {self.path}: {reason}; make room or choose another run folder"
        )


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a numpy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _numbers(value: Any) -> Any:
    """The reverse of `_plain` for what is not finite."""
    if isinstance(value, dict):
        return {name: _numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _mend_tail(path: Path) -> None:
    """Cuts an unfinished last line off, so that the next one does not continue it."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            end = start + newline + 1 if newline >= 0 else start
            if newline >= 0:
                break
        if end < size:
            file.truncate(end)


class Progress:
    """How far a run is: a bar on a terminal, now and then a plain line in a log file, nothing when quiet.

        with Progress(total_steps=500, tokens_per_step=2048) as progress:
            for step in range(1, 501):
                ...
                progress.update(step, loss, learning_rate=rate)

    On a terminal the bar redraws itself four times a second, whatever the steps do; `update` only stores what
    it is given. Elsewhere a line is written when a tenth of the run and at least `line_seconds` have passed
    since the last (after ten minutes in any case), and one at the end.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        console: Console | None = None,
        tokens_per_step: int | None = None,
        *,
        quiet: bool = False,
        unit: str = "tok",
        label: str = "training",
        line_seconds: float = 10.0,
    ) -> None:
        """
        Args:
            total_steps: the step at which the run ends.
            start_step: steps done before (a resumed run); they do not count in the speed.
            console: rich's; standard error when absent.
            tokens_per_step: for the speed in tokens; without it the speed is in steps.
            unit: what they are called, `tok`, or `img` of images.
            quiet: say nothing at all, notes included.
            label: what stands before the bar.
            line_seconds: the shortest time between two plain lines.
        """
        self.total_steps = total_steps
        self.tokens_per_step = tokens_per_step
        self.unit = unit
        self.label = label
        self._step = self._start_step = start_step
        self._line_seconds = line_seconds
        self._latest: tuple[float, dict[str, Any]] | None = None
        self._rate = _Rate()
        self._started = self._last_line_at = time.monotonic()
        self._last_line_step = start_step
        self._bar_moved_at = 0.0
        self._narrow = False
        self._console: Console | None = None
        self._bar: RichProgress | None = None
        if not quiet:
            if console is None:
                from rich.console import Console as RichConsole

                console = RichConsole(stderr=True)
            self._console = console
            # a line of a log may be long; a bar has to fit
            self._narrow = (console.is_terminal or console.is_jupyter) and console.width < 78

    def __enter__(self) -> Progress:
        self._started = self._last_line_at = time.monotonic()
        self._rate.begin(self._started, self._step)
        if self._console is not None and (self._console.is_terminal or self._console.is_jupyter):
            self._bar = _bar(self._console, self)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._move_bar()
            self._bar.stop()
            self._bar = None
        elif self._console is not None and self._step != self._last_line_step:
            self._line(time.monotonic())

    def update(self, step: int, loss: float, **extra: Any) -> None:
        """Tells that `step` steps are done, the loss of the last and what else is known of it.

        `learning_rate` and `tokens_per_second` are shown where they are given; the speed is measured between
        calls where it is not. Other values are ignored.
        """
        now = time.monotonic()
        self._step = step
        self._rate.add(now, step)
        if self._console is None:
            return
        self._latest = (loss, extra)
        if self._bar is not None:
            if now - self._bar_moved_at >= 0.1:
                self._bar_moved_at = now
                self._move_bar()
        else:
            waited = now - self._last_line_at
            tenth = (step - self._last_line_step) * 10 >= self.total_steps - self._start_step
            if (tenth and waited >= self._line_seconds) or waited >= 600:
                self._line(now)

    def note(self, text: str) -> None:
        """Writes a line above the bar (a checkpoint was saved, an evaluation's result)."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=self._bar is None)

    @property
    def steps_per_second(self) -> float:
        """The recent speed, everything between two steps included; 0 before the first."""
        return self._rate.value

    def status(self) -> str:
        """Loss, learning rate and speed, as the bar and the lines show them."""
        if self._latest is None:
            return ""
        loss, extra = self._latest
        parts = [f"loss {loss:.4f}"]
        if extra.get("learning_rate") is not None and not self._narrow:
            parts.append(f"lr {extra['learning_rate']:.2e}")
        speed = extra.get("tokens_per_second")
        if speed is None and self.tokens_per_step:
            speed = self._rate.value * self.tokens_per_step
        if speed:
            parts.append(f"{short_number(speed)} {self.unit}/s")
        elif self._rate.value:
            parts.append(f"{self._rate.value:.3g} steps/s")
        return "  ".join(parts)

    def times(self) -> str:
        """Time since the start, and time left where the speed is known."""
        elapsed = duration(time.monotonic() - self._started)
        left = self.total_steps - self._step
        if left <= 0 or not self._rate.value:
            return f"in {elapsed}" if left <= 0 else elapsed
        return f"{elapsed}, {duration(left / self._rate.value)} left"

    def _move_bar(self) -> None:
        assert self._bar is not None
        self._bar.update(self._bar.task_ids[0], completed=self._step)

    def _line(self, now: float) -> None:
        assert self._console is not None
        text = f"{self.label}  step {self._step}/{self.total_steps}  {self.status()}  {self.times()}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._last_line_at, self._last_line_step = now, self._step


class _Rate:
    """Steps a second, averaged over about the last 15 seconds, or over all of the run where it is younger."""

    horizon = 15.0

    def __init__(self) -> None:
        self.value = 0.0
        self._steps = self._seconds = 0.0
        self._time, self._step = time.monotonic(), 0

    def begin(self, now: float, step: int) -> None:
        self._time, self._step = now, step

    def add(self, now: float, step: int) -> None:
        seconds, steps = now - self._time, step - self._step
        if steps <= 0 or seconds <= 0:
            return
        fade = math.exp(-seconds / self.horizon)
        self._steps = self._steps * fade + steps
        self._seconds = self._seconds * fade + seconds
        self._time, self._step = now, step
        self.value = self._steps / self._seconds


def _bar(console: Console, owner: Progress) -> RichProgress:
    """A bar of rich's that asks `owner` for its words each time it is drawn."""
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column
    from rich.text import Text

    class Words(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text.assemble(
                (f"{owner._step}/{owner.total_steps}", "bold"),
                "  ",
                owner.status(),
                "  ",
                (owner.times(), "dim"),
            )

        def get_table_column(self) -> Column:
            return Column(no_wrap=True, overflow="ellipsis")

    # on a narrow screen the words matter more than the bar
    label = [TextColumn("{task.description}", markup=False)] if console.width >= 100 else []
    bar = RichProgress(
        *label,
        BarColumn(max(4, min(30, console.width - 76 - 10 * len(label)))),
        Words(),
        console=console,
        refresh_per_second=4,
    )
    bar.add_task(owner.label, total=owner.total_steps, completed=owner._step)
    return bar


def short_number(value: float) -> str:
    """Three digits and a unit: 950, 12.3k, 1.25M."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            digits = value / scale
            return f"{digits:.{max(0, 2 - int(math.log10(digits)))}f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 3:05:00; from two days on as days and hours."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole >= 172800:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def print_result(result: Any) -> None:
    """Says on standard output what a training run came to (a `trainer.Result`) and what to do with it."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    validation = f", validation loss {result.validation_loss:.4f}" if result.validation_loss is not None else ""
    if result.validation_accuracy is not None:
        validation += f", accuracy {result.validation_accuracy:.2%}"
    console.print(f"step {result.step}: loss {result.loss:.4f}{validation}", markup=False)
    console.print(f"run         {result.run}", markup=False)
    console.print(f"checkpoint  {result.checkpoint}", markup=False)
    plot = str(result.plot) if result.plot else "none: pip install 'icenet[plot]' draws one"
    console.print(f"plot        {plot}", markup=False)
