"""A measurement in a process of its own: memory that is counted from zero, and one framework only."""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from icenet.core import backends
from icenet.core.config import Config
from icenet.core.data.text.workers import processors
from icenet.core.errors import IceNetError
from icenet.core.training.run_folder import versions

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_MARK = "icenet-bench "
# the same sys.path as here, not the child's own
_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from icenet.commands.bench import process
from icenet.commands.bench.{room} import measure
process.answer(measure)
"""


def measure_apart(room: str, task: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What `measure(task)` of a module of this package gives in a fresh process; task and answer in JSON's types.

    Raises:
        IceNetError: it failed there; the line says what and where.
    """
    command = [sys.executable, "-c", _CHILD.format(room=room), json.dumps(sys.path)]
    child = subprocess.run(
        command,
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    answers = [line for line in child.stdout.splitlines() if line.startswith(_MARK)]
    if answers:
        answer: dict[str, Any] = json.loads(answers[-1].removeprefix(_MARK))
        if "error" in answer:
            raise IceNetError(f"bench {room} on {task['backend']}: {answer['error']}")
        return answer
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        why = " (the kernel does that where memory is short)" if name == "SIGKILL" else ""
        raise IceNetError(f"bench {room} on {task['backend']}: its process was killed by {name}{why}")
    last = "".join(child.stderr.strip().splitlines()[-1:])
    raise IceNetError(f"bench {room} on {task['backend']}: {last or f'ended with {child.returncode} and no answer'}")


def answer(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """In the child: reads the task, measures, prints."""
    try:
        found = measure(json.loads(sys.stdin.read()))
    except IceNetError as error:
        found = {"error": str(error)}
    print("\n" + _MARK + json.dumps(found), flush=True)


def interleaved(
    ways: Mapping[str, Callable[[], Any]], rounds: int, between: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Seconds that each of several ways takes, one after the other in each of `rounds`, after one to warm up.

    What else the machine does meanwhile hits all alike. `between` is called before each and within its time.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            between()
            begin = time.perf_counter()
            way()
            between()
            if number:
                times[name].append(time.perf_counter() - begin)
    return times


def ratio(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """How many times longer, pair by pair: the median, and the quartiles around it."""
    pairs = sorted(a / b for a, b in zip(values, base, strict=True))
    low, middle, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3
    return {"median": middle, "low": low, "high": high}


def backends_here(asked: str | None) -> list[str]:
    """The backend that is asked for, or all that are installed.

    Raises:
        BackendError: it is not installed, or none is.
    """
    if asked not in (None, "auto"):
        return [backends.resolve(str(asked))]
    found = [name for name in backends.PACKAGES if backends.installed(name)]
    return found or [backends.resolve("auto")]


def console() -> Console:
    """The screen, without colours for numbers; a file or a pipe has room for every column."""
    from rich.console import Console

    made = Console(highlight=False)
    if not made.is_terminal:
        made.width = max(made.width, 120)
    return made


def table(title: str, lines: Sequence[Mapping[str, str]], numbers: Sequence[str]) -> Table:
    """A table of texts by column; those of `numbers` stand at the right."""
    from rich.table import Table

    made = Table(title=title, title_style="bold", title_justify="left", box=None, pad_edge=False, padding=(0, 1))
    for column in lines[0]:
        made.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    for line in lines:
        made.add_row(*line.values())
    return made


def plain(config: Config) -> dict[str, Any]:
    """A configuration as a child takes it."""
    tree: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return tree


def machine(backend: str, device: str) -> dict[str, Any]:
    """What a figure was measured on."""
    return {
        "backend": backend,
        "device": device,
        "version": versions().get(backend),
        "platform": platform.platform(),
        "cores": processors(),
    }
