"""`icenet runs`: lists the runs in a folder and their states. Reads their files and loads no model."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from icenet.core.errors import IceNetError, UsageError
from icenet.core.listing import identity
from icenet.core.report.console import new_console, print_line
from icenet.core.report.metrics import MetricsLog, plain
from icenet.core.report.progress import short_number
from icenet.core.report.streams import printable
from icenet.core.runs import run_folder
from icenet.core.runs.checkpoint import list_checkpoints
from icenet.core.runs.early_stopping import EarlyStopping
from icenet.core.weights import safetensors as tensor_file
from icenet.core.weights.layout import STATISTICS

DEFAULT = Path("runs")
_DEPTH = 3
"""Depth of the search below the folder. Runs are not searched."""
_BACKEND = re.compile(rb'"backend": "(\w+)"')
_LEAST_WIDTH = {"model": 106, "backend": 86, "best validation": 68, "when": 118}
"""Minimum screen width of optional columns."""
_STATES = {"running": "green", "complete": "", "stopped": "yellow", "damaged": "bold red"}


@dataclass(frozen=True)
class RunState:
    """The state of a run, according to its files."""

    name: str
    """Path relative to the folder that was searched."""
    model: str | None
    num_params: int | None
    """Number of parameters in the newest checkpoint; None without one."""
    backends: list[str]
    """Backends in the order in which they trained the run."""
    step: int
    max_steps: int | None
    loss: float | None
    validation_loss: float | None
    """The lowest validation loss, in nats."""
    validation_step: int | None
    state: str
    """running, complete, stopped (can be resumed), or damaged (see `problem`)."""
    when: str
    """Time of the last change, ISO 8601 in UTC."""
    problem: str | None = None

    def cells(self) -> dict[str, str]:
        """Returns the texts of the table, by column."""
        validation = f"{_loss(self.validation_loss)} at {self.validation_step:,}" if self.validation_step else ""
        used = self.backends if len(self.backends) < 4 else [self.backends[0], "…", self.backends[-1]]
        return {
            "run": printable(self.name),
            "model": f"{Path(str(self.model or '')).name} {short_number(self.num_params) if self.num_params else ''}",
            "backend": " → ".join(used),
            "step": f"{self.step:,}/{self.max_steps:,}" if self.max_steps else f"{self.step:,}",
            "loss": _loss(self.loss),
            "best validation": validation,
            "state": self.state,
            "when": ago(self.when),
        }


@dataclass(frozen=True)
class RunList:
    """The runs in a folder, newest first."""

    folder: Path
    runs: list[RunState]

    def as_dict(self) -> list[dict[str, Any]]:
        return [plain(asdict(run)) for run in self.runs]

    def render(self) -> None:
        from rich.table import Table
        from rich.text import Text

        console = new_console()
        if not self.runs:
            line = f"no runs in {self.folder}; start one: icenet train quickstart"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        columns = ("run", "model", "backend", "step", "loss", "best validation", "state", "when")
        shown = [column for column in columns if console.width >= _LEAST_WIDTH.get(column, 0)]
        for column in shown:
            justify: Any = "right" if column in ("step", "loss", "best validation") else "left"
            table.add_column(column, justify=justify, no_wrap=column != "run", overflow="fold")
        for run in self.runs:
            cells = run.cells()
            table.add_row(*(Text(cells[column], style=_STATES.get(cells[column], "")) for column in shown))
        console.print(table)
        for run in self.runs:
            if run.problem:
                print_line(console, f"{run.name}: {run.problem}")


def list_runs(folder: Path | None = None) -> RunList:
    """Returns the runs in a folder (default: `runs`), or the run that the folder is.

    Raises:
        UsageError: The folder does not exist.
    """
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give a folder that contains runs")
    folder = folder or DEFAULT
    found = [describe(run, _name(run, folder)) for run in _runs_below(folder, _DEPTH, set())]
    return RunList(folder, sorted(found, key=lambda run: run.when, reverse=True))


def describe(run: Path, name: str | None = None) -> RunState:
    """Returns the state of a run. Of checkpoints, the existence and the size of files are checked, not the hashes."""
    problem: str | None = None
    settings: dict[str, Any] = {}
    try:
        settings = _settings(run)
    except IceNetError as error:
        problem = str(error)
    training = settings.get("training") or {}
    step, loss, best, backends = _progress(run / "metrics.jsonl")
    newest = next(reversed(list_checkpoints(run)), None)
    stored: dict[str, Any] = {}
    size = None
    if newest is not None:
        step = max(step, int(newest.name.partition("-")[2]))
        try:
            stored, size = _checkpoint(newest)
        except IceNetError as error:
            rest = "; --resume names the newest intact checkpoint" if len(list_checkpoints(run)) > 1 else ""
            problem = problem or f"{error}{rest}"
    goal = training.get("max_steps")
    over = newest is not None and isinstance(goal, int) and int(newest.name.partition("-")[2]) >= goal
    if run_folder.is_locked(run):
        state, problem = "running", None  # files that are being written look damaged
    elif problem is not None:
        state = "damaged"
    else:
        state = "complete" if over or _stopped_early(stored, training) else "stopped"
    changed = max(_changed(path) for path in (run / "metrics.jsonl", run / "config.yaml", newest or run))
    return RunState(
        name=name or run.name,
        model=(settings.get("model") or {}).get("type"),
        num_params=size,
        backends=backends,
        step=step,
        max_steps=goal if isinstance(goal, int) else None,
        loss=loss,
        validation_loss=best[0] if best else None,
        validation_step=best[1] if best else None,
        state=state,
        when=datetime.fromtimestamp(changed, timezone.utc).isoformat(timespec="seconds"),
        problem=problem,
    )


def ago(when: str) -> str:
    """Formats an ISO 8601 time relative to now: `5 min ago`; a week or longer ago as a date."""
    then = datetime.fromisoformat(when)
    seconds = time.time() - then.timestamp()
    for unit, size, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 36), ("days", 86400, 7)):
        if seconds < most * size:
            return f"{max(seconds, 0) / size:.0f} {unit} ago"
    return then.astimezone().strftime("%Y-%m-%d")


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _name(run: Path, folder: Path) -> str:
    return str(run.relative_to(folder)) if run != folder else run.resolve().name


def _runs_below(folder: Path, depth: int, seen: set[object]) -> Iterator[Path]:
    """Yields the folder if it is a run, otherwise the runs below it.

    Links are followed, and each folder is searched once. A folder that cannot be read is a warning.

    Args:
        folder: The folder.
        depth: Number of levels to search below it.
        seen: Identities of the folders that were searched; receives more.
    """
    try:
        if (found := identity(folder)) in seen:
            return
        seen.add(found)
        names = set(os.listdir(folder))
    except FileNotFoundError:  # the default folder, or one that was removed meanwhile
        return
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        logging.getLogger("icenet").warning("%s: not searched for runs: %s", folder, reason)
        return
    if "metrics.jsonl" in names or {"checkpoints", "config.yaml"} <= names or {".lock", "config.yaml"} <= names:
        yield folder
    elif depth:
        # a run has its own name rather than that of a link to it
        subfolders = [folder / name for name in names if name[0] != "." and os.path.isdir(folder / name)]
        for subfolder in sorted(subfolders, key=lambda path: (path.is_symlink(), path.name)):
            yield from _runs_below(subfolder, depth - 1, seen)


def _settings(run: Path) -> dict[str, Any]:
    """Reads config.yaml without validating it, which would take most of the time.

    Raises:
        IceNetError: It cannot be read.
    """
    try:
        found = yaml.load((run / "config.yaml").read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    except (OSError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not YAML"
        raise IceNetError(f"{run / 'config.yaml'}: cannot be read: {reason}") from None
    parts = [found.get(part) or {} for part in ("model", "training")] if isinstance(found, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise IceNetError(f"{run / 'config.yaml'}: not a configuration")
    return dict(found)


def _progress(metrics: Path) -> tuple[int, float | None, tuple[float, int] | None, list[str]]:
    """Returns the last step, its loss, the lowest validation loss with its step, and the backends.

    Only the necessary lines are parsed: a long run has a million.
    """
    try:
        content = metrics.read_bytes()
    except OSError:
        return 0, None, None, []
    lines = content.split(b"\n")
    steps = (record for line in reversed(lines) if b'"loss"' in line for record in _parsed(line))
    last = next(steps, {})
    evaluations = [record for line in lines if b'"validation_loss"' in line for record in _parsed(line)]
    best = [
        (record["validation_loss"], record["step"])
        for record in evaluations
        if isinstance(record.get("validation_loss"), (int, float)) and math.isfinite(record["validation_loss"])
    ]
    backends = [name.decode() for name, _ in itertools.groupby(_BACKEND.findall(content))]
    loss = last.get("loss")
    return int(last.get("step", 0)), loss if isinstance(loss, float) else None, min(best, default=None), backends


def _parsed(line: bytes) -> list[dict[str, Any]]:
    """Returns the record of a line in a list, which is empty if the line is incomplete or has no step."""
    return [record for record in MetricsLog.parse(line) if isinstance(record.get("step"), int)]


def _checkpoint(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the state of a checkpoint and the number of its parameters.

    Raises:
        IceNetError: A file is missing or has the wrong size.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        state = json.loads((path / "state.json").read_bytes())
        sizes = {name: int(entry["bytes"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise IceNetError(f"{path.name} is damaged: its manifest.json or state.json cannot be read") from None
    for name, size in sizes.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise IceNetError(f"{path.name} is damaged: {name} is {'cut short' if file.is_file() else 'missing'}")
    weights = [path / name for name in sizes if name.startswith("model") and name.endswith(".safetensors")]
    entries = [tensor_file.open_file(file)[1] for file in weights]
    shapes = {name: entry.shape for part in entries for name, entry in part.items()}
    count = sum(math.prod(shape) for name, shape in shapes.items() if name.rpartition(".")[2] not in STATISTICS)
    return state if isinstance(state, dict) else {}, count


def _stopped_early(state: dict[str, Any], training: dict[str, Any]) -> bool:
    """Returns whether `training.early_stopping` ended the run."""
    patience = training.get("early_stopping")
    return isinstance(patience, int) and EarlyStopping.read(state.get("best")).should_stop(patience)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
