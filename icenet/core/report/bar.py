"""Progress of work that is counted in bytes, such as tokenizing a text, or in other units."""

from __future__ import annotations

import time

from icenet.core.report.console import print_line, stderr_console
from icenet.core.report.progress import LiveBar, duration, live_bar, short_number

_DELAY_SECONDS = 1.0
"""Work that takes less time shows nothing."""
_LINE_SECONDS = 15.0


class Bar:
    """Shows a bar on a terminal or in a notebook, and a line every 15 seconds in a log file.

    with Bar("tokenizing stdlib") as bar:
        bar(done, total)      # bytes, from any thread
    """

    def __init__(self, label: str, quiet: bool = False, unit: str | None = None) -> None:
        """
        Args:
            label: Text in front of the bar.
            quiet: Show nothing.
            unit: What is counted; default: bytes.
        """
        self.label = label
        self.unit = "B" if unit is None else f" {unit}"
        self.quiet = quiet
        self._bar: LiveBar | None = None
        self._started = self._last_line_at = time.monotonic()
        self._resumed_at: int | None = None
        """Bytes that an earlier attempt had completed."""
        self._done = self._total = 0

    def __enter__(self) -> Bar:
        self._started = self._last_line_at = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop(self._done)
            self._bar = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._resumed_at is None:
            self._resumed_at = done
        self._done, self._total = done, total
        if self.quiet or now - self._started < _DELAY_SECONDS:
            return
        console = stderr_console()
        if self._bar is None:
            self._bar = live_bar(console, self.label, lambda _: [self.status()], total, done, transient=True)
        if self._bar is not None:
            self._bar.update(done, total)
        elif now - self._last_line_at >= _LINE_SECONDS:
            self._last_line_at = now
            print_line(console, f"{self.label}  {done / max(total, 1):.0%}  {self.status()}")

    def status(self) -> str:
        """Returns the bytes done and in total, the speed and the time left."""
        seconds = time.monotonic() - self._started
        rate = (self._done - (self._resumed_at or 0)) / max(seconds, 1e-9)
        text = f"{short_number(self._done)}{self.unit} of {short_number(self._total)}{self.unit}"
        if rate <= 0:
            return f"{text}  {duration(seconds)}"
        left = duration((self._total - self._done) / rate)
        return f"{text}  {short_number(rate)}{self.unit}/s  {duration(seconds)}, {left} left"
