"""How far a run is, on a terminal, in a notebook and in a log file."""

from __future__ import annotations

import contextlib
import html
import math
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


class Progress:
    """How far a run is: a bar on a terminal, now and then a plain line in a log file, nothing when quiet.

        with Progress(total_steps=500, tokens_per_step=2048) as progress:
            for step in range(1, 501):
                ...
                progress.update(step, loss, learning_rate=rate)

    On a terminal the bar redraws itself four times a second, whatever the steps do; `update` only stores what
    it is given. In a notebook it is one output, replaced at most as often. Elsewhere a line is written when a tenth
    of the run and at least `line_seconds` have passed since the last (after ten minutes in any case), and one at
    the end: a log file gets neither carriage returns nor escape codes, whatever the environment says of colours.
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
        self._console: Console | None = None
        self._bar: _TerminalBar | _NotebookBar | None = None
        if not quiet:
            if console is None:
                from rich.console import Console as RichConsole

                # FORCE_COLOR, which CI sets for colours, would have rich draw a bar into a file
                console = RichConsole(stderr=True, force_terminal=None if sys.stderr.isatty() else False)
            self._console = console

    def __enter__(self) -> Progress:
        self._started = self._last_line_at = time.monotonic()
        self._rate.begin(self._started, self._step)
        if self._console is not None:
            self._bar = _bar(self._console, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
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
            if now - self._bar_moved_at >= self._bar.seconds:
                self._bar_moved_at = now
                self._bar.move()
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
        """Loss, learning rate and speed, as the lines show them."""
        return "  ".join(filter(None, self._words().values()))

    def fitting(self, room: int) -> list[str]:
        """What a bar says, as much of it as `room` characters hold; the step always."""
        elapsed, _, left = self.times().partition(", ")
        words = {"step": f"{self._step}/{self.total_steps}", **self._words(), "elapsed": elapsed, "left": left}
        chosen = {"step"}
        for name in ("loss", "left", "speed", "rate", "elapsed"):
            wanted = [words[n] for n in words if n in chosen | {name} and words[n]]
            if words.get(name) and len("  ".join(wanted)) <= room:
                chosen.add(name)
        return [words[name] for name in words if name in chosen]

    def _words(self) -> dict[str, str]:
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
        """Time since the start, and time left where the speed is known."""
        elapsed = duration(time.monotonic() - self._started)
        left = self.total_steps - self._step
        if left <= 0 or not self._rate.value:
            return f"in {elapsed}" if left <= 0 else elapsed
        return f"{elapsed}, {duration(left / self._rate.value)} left"

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


def _bar(console: Console, owner: Progress) -> _TerminalBar | _NotebookBar | None:
    """What can be drawn on a console; None where it has to be lines."""
    if console.is_jupyter:
        with contextlib.suppress(ImportError):
            return _NotebookBar(owner)
    if console.is_terminal and not console.is_dumb_terminal and not console.is_jupyter:
        return _TerminalBar(console, owner)
    return None


class _TerminalBar:
    """A bar of rich's that asks `owner` for its words each time it is drawn, and so follows the window's width."""

    seconds = 0.1

    def __init__(self, console: Console, owner: Progress) -> None:
        from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column
        from rich.text import Text

        # on a narrow screen the words matter more than the bar
        label = [TextColumn("{task.description}", markup=False)] if console.width >= 100 else []
        wide = max(4, min(30, console.width - 76 - 10 * len(label)))
        taken = wide + 2 + (len(owner.label) + 1) * len(label)

        class Words(ProgressColumn):
            def render(self, task: Task) -> Text:
                step, *words = owner.fitting(console.width - taken)
                return Text.assemble((step, "bold"), "".join(f"  {word}" for word in words))

            def get_table_column(self) -> Column:
                return Column(no_wrap=True, overflow="ellipsis")

        self._owner = owner
        self._bar = RichProgress(*label, BarColumn(wide), Words(), console=console, refresh_per_second=4)
        self._task = self._bar.add_task(owner.label, total=owner.total_steps, completed=owner._step)
        self._bar.start()

    def move(self) -> None:
        self._bar.update(self._task, completed=self._owner._step)

    def stop(self) -> None:
        self.move()
        self._bar.stop()


class _NotebookBar:
    """One output of a notebook's cell, replaced as the run goes on. Needs IPython only; rich's needs ipywidgets."""

    seconds = 0.25

    def __init__(self, owner: Progress) -> None:
        """
        Raises:
            ImportError: IPython is not there.
        """
        from IPython.display import display

        self._owner = owner
        self._output = display(self._shown(), raw=True, display_id=True)

    def move(self) -> None:
        self._output.update(self._shown(), raw=True)

    def stop(self) -> None:
        self.move()

    def _shown(self) -> dict[str, str]:
        owner = self._owner
        words = f"{owner.label}  {'  '.join(owner.fitting(200))}"
        bar = f'<progress style="width: 16em" max="{owner.total_steps}" value="{owner._step}"></progress>'
        page = f'<div style="font-family: monospace; white-space: pre-wrap">{bar}  {html.escape(words)}</div>'
        return {"text/plain": words, "text/html": page}


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
