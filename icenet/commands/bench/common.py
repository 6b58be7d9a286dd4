"""Code that the measurements share: separate processes, interleaved timing, tables."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from icenet.commands import isolated
from icenet.commands.doctor import system_facts
from icenet.commands.overrides import option
from icenet.core import backends
from icenet.core.config import Config
from icenet.core.errors import IceNetError
from icenet.core.report.console import new_console
from icenet.core.training.run_folder import versions

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Notify = Callable[[str], None]
"""Receives a line of progress."""


def ignore(text: str) -> None:
    """Discards a line of progress."""


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
