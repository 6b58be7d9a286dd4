"""How far the making of tokens is: a bar on a terminal and in a notebook, now and then a line in a log file."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from icenet.core.report.progress import duration, short_number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

_SHORT_SECONDS = 1.0
"""Work that is done sooner shows nothing."""
_LINE_SECONDS = 15.0


class Bar:
    """Called with the bytes done and those in all, from any thread. Nothing is shown of what takes a moment.

    with Bar("making tokens of stdlib") as bar:
        load_tokens(source, tokenizer, progress=bar)
    """

    def __init__(self, label: str, quiet: bool = False, console: Console | None = None) -> None:
        """`console` is rich's; standard error when absent."""
        self.label = label
        self.quiet = quiet
        self._console = console
        self._bar: RichProgress | None = None
        self._began = self._told = time.monotonic()
        self._skipped: int | None = None
        self._done = self._total = 0

    def __enter__(self) -> Bar:
        self._began = self._told = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._skipped is None:  # what an earlier attempt had done
            self._skipped = done
        self._done, self._total = done, total
        if self.quiet or now - self._began < _SHORT_SECONDS:
            return
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True)
        if self._console.is_terminal or self._console.is_jupyter:
            if self._bar is None:
                self._bar = _new_bar(self._console, self)
                self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        elif now - self._told >= _LINE_SECONDS:
            self._told = now
            line = f"{self.label}  {done / max(total, 1):.0%}  {self.words()}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def words(self) -> str:
        """Bytes done and in all, the speed, and the time left."""
        seconds = time.monotonic() - self._began
        rate = (self._done - (self._skipped or 0)) / max(seconds, 1e-9)
        text = f"{short_number(self._done)}B of {short_number(self._total)}B"
        if rate <= 0:
            return f"{text}  {duration(seconds)}"
        left = duration((self._total - self._done) / rate)
        return f"{text}  {short_number(rate)}B/s  {duration(seconds)}, {left} left"


def _new_bar(console: Console, owner: Bar) -> RichProgress:
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Words(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(owner.words())

        def get_table_column(self) -> Column:
            return Column(no_wrap=True, overflow="ellipsis")

    label = [TextColumn("{task.description}", markup=False)] if console.width >= 100 else []
    width = max(4, min(30, console.width - 60 - (len(owner.label) + 1) * len(label)))
    bar = Progress(*label, BarColumn(width), Words(), console=console, refresh_per_second=4, transient=True)
    bar.add_task(owner.label, total=None)
    return bar
