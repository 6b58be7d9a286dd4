"""Code that the measurements share: separate processes, interleaved timing, tables, reports."""

from __future__ import annotations

import contextlib
import json
import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from icenet.commands import isolated
from icenet.commands.doctor import system_facts
from icenet.commands.overrides import option
from icenet.core import backends
from icenet.core.config import Config
from icenet.core.errors import IceNetError, UsageError
from icenet.core.report.console import new_console
from icenet.core.runs.run_folder import versions

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Notify = Callable[[str], None]
"""Receives a line of progress."""


def ignore(text: str) -> None:
    """Discards a line of progress."""


@contextlib.contextmanager
def waiting(notify: Notify, text: str, every: float = 20.0) -> Iterator[None]:
    """Repeats a line of progress while the block runs, with the seconds that have passed.

    Args:
        notify: Receives the lines, in another thread.
        text: What the block waits for.
        every: Seconds between the lines.
    """
    done, begin = threading.Event(), time.perf_counter()

    def repeat() -> None:
        while not done.wait(every):
            notify(f"{text}, {time.perf_counter() - begin:.0f} s so far")

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def chosen_by_options(backend: str | None, device: str | None) -> dict[str, str | None]:
    """Returns what replaces the keys `backend` and `device` in a measurement (see `overrides.warn_of_replaced`)."""
    every = "every installed backend is measured; choose one with --backend"
    return {"backend": option("--backend", backend) or every, "device": option("--device", device)}


def measure_isolated(
    name: str, task: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Returns `measure(task)` of the module `icenet.commands.bench.NAME`, run in a fresh process.

    The process imports one framework only, and its memory is measured from zero.

    Args:
        name: "memory", "step" or "dropout".
        task: The arguments of the measurement, in JSON types; `backend` names the backend.
        environment: Environment variables to set.

    Raises:
        IceNetError: The measurement failed.
    """
    try:
        result: dict[str, Any] = isolated.call(
            f"{__package__}.{name}", "measure", dict(task), environment=environment
        )
    except isolated.IsolatedError as error:
        raise IceNetError(f"bench {name} on {task['backend']}: {error}") from None
    return result


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int, synchronize: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Returns the seconds of each call of several functions.

    Each round calls every function once, so that other load on the machine affects all of them equally. The first
    round is a warm-up and does not count.

    Args:
        functions: The functions, by name.
        rounds: Number of rounds that count.
        synchronize: Waits for the device; called before and after each call, the second time within the timing.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            synchronize()
            begin = time.perf_counter()
            function()
            synchronize()
            if number:
                times[name].append(time.perf_counter() - begin)
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile of at least one value.

    They are within the range of the values: the default of `statistics.quantiles` estimates those of a larger sample,
    and gives negative speeds for two values that differ much.
    """
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return low, middle, high


def ratio(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Returns the median (`median`) and the quartiles (`low`, `high`) of `values[i] / base[i]`."""
    low, middle, high = quartiles([a / b for a, b in zip(values, base, strict=True)])
    return {"median": middle, "low": low, "high": high}


def installed_backends(backend: str | None) -> list[str]:
    """Returns the given backend, or every installed one if it is None or `auto`.

    Raises:
        BackendError: The given backend is not installed, or none is.
    """
    if backend not in (None, "auto"):
        return [backends.resolve(str(backend))]
    found = [name for name in backends.PACKAGES if backends.installed(name)]
    return found or [backends.resolve("auto")]


def console() -> Console:
    """Returns the console of the tables."""
    return new_console(highlight=False)


def table(title: str, rows: Sequence[Mapping[str, str]], right_aligned: Iterable[str]) -> Table:
    """Returns a table of rows, each a mapping from column to text."""
    from rich.table import Table

    table = Table(title=title, title_style="bold", title_justify="left", box=None, pad_edge=False, padding=(0, 1))
    for column in rows[0]:
        right = column in right_aligned
        table.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    return table


def json_config(config: Config) -> dict[str, Any]:
    """Returns a configuration in JSON types, for a task that is sent to another process."""
    tree: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return tree


def machine(backend: str, device: str) -> dict[str, Any]:
    """Returns the backend, device, version, platform and number of cores of a measurement."""
    system = system_facts()
    return {
        "backend": backend,
        "device": device,
        "version": versions().get(backend),
        "platform": system["platform"],
        "cores": system["cores"],
    }


def rounded(value: float) -> str:
    """Returns a number with three significant digits, or all those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class SidesReport(ABC):
    """The results of sides that are measured in turn.

    Attributes:
        machine: The platform, and the framework and device of each side.
        rates: By dtype, the measured rates of the machine, if a limit needs them.
        results: One entry for each row and case, with its `title` and its `sides`.
        notes: What could not be measured, and why.
        interruption: Ctrl-C or the signal that ended the measurement.
    """

    machine: dict[str, Any]
    rates: dict[str, Any]
    results: list[dict[str, Any]]
    notes: list[str]
    interruption: BaseException | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "rates": self.rates,
            "results": self.results,
            "notes": self.notes,
            "interrupted": self.interruption is not None,
        }

    def render(self) -> None:
        output = console()
        for result in self.results:
            rows = [self.cells(result, entry) for entry in result["sides"]]
            output.print(table(result["title"], rows, [name for name in rows[0] if name != "side"]))
            output.print(self.limit(result), soft_wrap=True, markup=False)
            output.print()
        for line in (self.summary(), *self.notes):
            output.print(line, soft_wrap=True, markup=False)

    @abstractmethod
    def cells(self, result: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, str]:
        """Returns a line of a table, by column: a side of a result."""

    @abstractmethod
    def limit(self, result: Mapping[str, Any]) -> str:
        """Returns the line below a table: the physical limit."""

    @abstractmethod
    def summary(self) -> str:
        """Returns the line below all tables."""


class Sides:
    """The processes of the sides, one each.

    A side that fails is left out with a note. It gets a new process, because the old one may hold memory of the
    device or may have ended.

    Args:
        session: The class that runs in a process, with the arguments name and device. Its method `facts` returns the
            kind of the device ("device") and others.
        device: The device of all sides.
        notify: Receives a line of progress.

    Attributes:
        facts: What `facts` returned, by side.
        notes: What could not be measured, and why.
    """

    def __init__(self, session: type, device: str | None, notify: Notify) -> None:
        self._session, self._device, self._notify = session, device or "auto", notify
        self._workers: dict[str, isolated.Worker] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []

    @property
    def names(self) -> list[str]:
        """The sides that run."""
        return list(self._workers)

    @property
    def device(self) -> str:
        """The kind of the devices: gpu if one is, otherwise cpu."""
        return "gpu" if any(facts["device"] == "gpu" for facts in self.facts.values()) else "cpu"

    def open(self, missing: Mapping[str, str]) -> None:
        """Starts sides, all of them at the same time.

        Args:
            missing: By name, why a side cannot run; an empty text if it can.
        """
        reasons: dict[str, list[str]] = {}
        for name, reason in missing.items():
            if reason:
                reasons.setdefault(reason, []).append(name)
            else:
                self._workers[name] = self._new(name)
        for name in self.names:
            self._notify(f"{name}: starts")
            try:
                self.facts[name] = self._workers[name].call("facts")
            except isolated.IsolatedError as error:
                reasons.setdefault(str(error), []).append(name)
        for reason, names in reasons.items():
            self.leave_out(names, reason)

    def call(
        self, name: str, method: str, *arguments: Any, part: str = "", timeout: float | None = None, advice: str = ""
    ) -> Any:
        """Returns the result of a method of a side. After a failure, a note has the reason and the result is None.

        Args:
            part: What is measured, for the note.
            timeout: Seconds after which the side has failed.
            advice: What the note says after them.
        """
        try:
            return self._workers[name].call(method, *arguments, timeout=timeout)
        except isolated.IsolatedError as error:
            reason = f"{error}; {advice}" if isinstance(error, isolated.TimeoutReached) else str(error)
            self.notes.append(": ".join(filter(None, [name, part, "not measured", reason])))
            self._workers[name].close()
            self._workers[name] = self._new(name)
            return None

    def leave_out(self, names: Sequence[str], reason: str) -> None:
        """Ends sides, with one note."""
        if not names:
            return
        self.notes.append(f"{', '.join(names)}: not measured: {reason}")
        for name in names:
            if name in self._workers:
                self._workers.pop(name).close()

    def close(self) -> None:
        """Ends all sides."""
        for worker in self._workers.values():
            worker.close()

    def _new(self, name: str) -> isolated.Worker:
        return start(self._session, name, self._device)


def chosen_sides(able: Mapping[str, str], only: Sequence[str] | None, backend: str | None) -> list[str]:
    """Returns the sides to measure.

    Args:
        able: By name, the backend of each side that can be measured.
        only: The names of `--side`; None or no names: all.
        backend: The value of `--backend`.

    Raises:
        UsageError: There is none.
    """
    found = [name for name in able if name in (only or able)]
    chosen = [name for name in found if backend in (None, "auto", able[name])]
    if not found:
        raise UsageError(f"--side {','.join(only or ())}: cannot be measured here; choose from {', '.join(able)}")
    if not chosen:
        raise UsageError(
            f"--side {','.join(found)} and --backend {backend} exclude each other; leave one of them out"
        )
    return chosen


def start(session: type, name: str, device: str) -> isolated.Worker:
    """Returns the process of a side."""
    environment = {"MLX_ENABLE_TF32": "0"}  # as in IceNet, unless allow_tf32 is set; PyTorch's default is the same
    return isolated.Worker(session.__module__, session.__name__, name, device, environment=environment)
