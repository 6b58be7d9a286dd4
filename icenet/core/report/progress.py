"""Progress of a run, on a terminal, in a notebook and in a log file."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from icenet.core.report.console import print_line, stderr_console
from icenet.core.report.streams import printable

if TYPE_CHECKING:
    from rich.console import Console


class Progress:
    """Shows the progress of training.

        with Progress(total_steps=500, tokens_per_step=2048) as progress:
            for step in range(1, 501):
                ...
                progress.update(step, loss, learning_rate=rate)

    On a terminal and in a notebook it is a bar (`LiveBar`). Elsewhere, as in a log file, it prints plain lines: when
    a tenth of the run and `line_seconds` have passed since the last line, or ten minutes, and at the end. The lines
    contain neither carriage returns nor escape codes, regardless of the environment variables for colors.
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
            total_steps: Number of steps of the run.
            start_step: Number of steps before this process (of a resumed run); they do not count in the speed.
            console: Console to write to; default: standard error.
            tokens_per_step: Number of tokens in a step, for a speed in tokens. If absent, the speed is in steps.
            quiet: Show nothing, notes included.
            unit: Unit of the speed: `tok`, `img` or `row`.
            label: Shown in front of the bar.
            line_seconds: Shortest time between two plain lines.
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
        self._console = None if quiet else console or stderr_console()
        self._bar: LiveBar | None = None

    def __enter__(self) -> Progress:
        self._started = self._last_line_at = time.monotonic()
        self._rate.start(self._started, self._step)
        if self._console is not None:
            self._bar = live_bar(self._console, self.label, self.fitting, self.total_steps, self._step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop(self._step)
            self._bar = None
        elif self._console is not None and self._step != self._last_line_step:
            self._print_line(time.monotonic())

    def update(self, step: int, loss: float, **extra: Any) -> None:
        """Reports that `step` steps are complete.

        Args:
            step: Number of completed steps.
            loss: Loss of the last step.
            extra: `learning_rate` and `tokens_per_second` are shown. Without the latter, the speed is measured
                between calls. Other values are ignored.
        """
        now = time.monotonic()
        self._step = step
        self._rate.add(now, step)
        if self._console is None:
            return
        self._latest = (loss, extra)
        if self._bar is not None:
            self._bar.update(step)
            return
        waited = now - self._last_line_at
        tenth = (step - self._last_line_step) * 10 >= self.total_steps - self._start_step
        if (tenth and waited >= self._line_seconds) or waited >= 600:
            self._print_line(now)

    def note(self, text: str) -> None:
        """Prints a line above the bar, such as the result of an evaluation."""
        if self._console is not None:
            self._console.print(printable(text), markup=False, highlight=False, soft_wrap=self._bar is None)

    def status(self) -> str:
        """Returns loss, learning rate and speed, as a plain line shows them."""
        return "  ".join(filter(None, self._values().values()))

    def fitting(self, width: int) -> list[str]:
        """Returns the texts of a bar that fit in `width` characters, most important first; always the step."""
        elapsed, _, left = self.times().partition(", ")
        texts = {"step": f"{self._step}/{self.total_steps}", **self._values(), "elapsed": elapsed, "left": left}
        chosen = {"step"}
        for name in ("loss", "left", "speed", "rate", "elapsed"):
            wanted = [texts[n] for n in texts if n in chosen | {name} and texts[n]]
            if texts.get(name) and len("  ".join(wanted)) <= width:
                chosen.add(name)
        return [texts[name] for name in texts if name in chosen]

    def _values(self) -> dict[str, str]:
        """Returns loss, learning rate and speed as texts; an unknown one is empty."""
        if self._latest is None:
            return {}
        loss, extra = self._latest
        rate, speed = extra.get("learning_rate"), extra.get("tokens_per_second")
        if speed is None and self.tokens_per_step:
            speed = self._rate.value * self.tokens_per_step
        steps = f"{self._rate.value:.3g} steps/s" if self._rate.value else ""
        return {
            "loss": f"loss {loss:.4f}",
            "rate": "" if rate is None else f"lr {rate:.2e}",
            "speed": f"{short_number(speed)} {self.unit}/s" if speed else steps,
        }

    def times(self) -> str:
        """Returns the time since the start, and the time left if the speed is known."""
        elapsed = duration(time.monotonic() - self._started)
        left = self.total_steps - self._step
        if left <= 0 or not self._rate.value:
            return f"in {elapsed}" if left <= 0 else elapsed
        return f"{elapsed}, {duration(left / self._rate.value)} left"

    def _print_line(self, now: float) -> None:
        assert self._console is not None
        print_line(
            self._console, f"{self.label}  step {self._step}/{self.total_steps}  {self.status()}  {self.times()}"
        )
        self._last_line_at, self._last_line_step = now, self._step


class _Rate:
    """Steps per second, averaged over about the last 15 seconds, or over the whole run if it is shorter."""

    horizon = 15.0

    def __init__(self) -> None:
        self.value = 0.0
        self._steps = self._seconds = 0.0
        self._time, self._step = time.monotonic(), 0

    def start(self, now: float, step: int) -> None:
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


class LiveBar:
    """A progress bar drawn by rich: redrawn in place on a terminal, one output that is replaced in a notebook.

    In a notebook it needs IPython only, while rich's own live display there also needs ipywidgets. Create it with
    `live_bar`.
    """

    def __init__(
        self,
        console: Console,
        label: str,
        describe: Callable[[int], Sequence[str]],
        total: float | None,
        completed: int,
        transient: bool,
    ) -> None:
        """
        Raises:
            ImportError: IPython is missing in a notebook.
        """
        from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column
        from rich.text import Text

        # a narrow screen has a short bar and no label: the texts matter more
        labels = [TextColumn("{task.description}", markup=False)] if console.width >= 100 else []
        bar_width = max(4, min(30, console.width - 76 - 10 * len(labels)))
        taken = bar_width + 2 + (len(label) + 1) * len(labels)

        class Description(ProgressColumn):
            def render(self, task: Task) -> Text:
                first, *rest = describe(console.width - taken)  # at each refresh: the window may have been resized
                return Text.assemble((first, "bold"), "".join(f"  {text}" for text in rest))

            def get_table_column(self) -> Column:
                return Column(no_wrap=True, overflow="ellipsis")

        columns = (*labels, BarColumn(bar_width), Description())
        self._progress = RichProgress(*columns, console=console, refresh_per_second=4, transient=transient)
        self._task = self._progress.add_task(label, total=total, completed=completed)
        self._interval = 0.25 if console.is_jupyter else 0.1
        self._updated_at = 0.0
        self._output: Any = None
        if console.is_jupyter:
            from IPython.display import display

            self._output = display(self._table(), display_id=True)
        else:
            self._progress.start()

    def update(self, completed: int, total: float | None = None) -> None:
        """Moves the bar, at most every 0.1 s (in a notebook 0.25 s)."""
        now = time.monotonic()
        if now - self._updated_at >= self._interval:
            self._updated_at = now
            self._move(completed, total)

    def stop(self, completed: int) -> None:
        """Draws the bar for the last time."""
        self._move(completed, None)
        self._progress.stop()

    def _move(self, completed: int, total: float | None) -> None:
        self._progress.update(self._task, completed=completed, total=total)
        if self._output is not None:
            self._output.update(self._table())

    def _table(self) -> Any:
        return self._progress.make_tasks_table(self._progress.tasks)


def live_bar(
    console: Console,
    label: str,
    describe: Callable[[int], Sequence[str]],
    total: float | None,
    completed: int = 0,
    *,
    transient: bool = False,
) -> LiveBar | None:
    """Returns a running bar, or None on a console that can only print lines.

    Args:
        console: Console to draw on.
        label: Shown in front of the bar if the console is wide enough.
        describe: Returns the texts behind the bar for a number of characters; the first one is emphasized.
        total: Value of a complete bar; None if unknown.
        completed: Value at the start.
        transient: Remove the bar from a terminal when it stops.
    """
    if console.is_jupyter:
        with contextlib.suppress(ImportError):
            return LiveBar(console, label, describe, total, completed, transient)
    elif console.is_terminal and not console.is_dumb_terminal:
        return LiveBar(console, label, describe, total, completed, transient)
    return None


def short_number(value: float) -> str:
    """Formats a number with three digits and a unit: 950, 12.3k, 1.25M."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            digits = value / scale
            return f"{digits:.{max(0, 2 - int(math.log10(digits)))}f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Formats seconds as 0:07, 12:34 or 3:05:00; two days and more as days and hours."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole >= 172800:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
