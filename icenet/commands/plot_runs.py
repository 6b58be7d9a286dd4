"""The runs that `icenet plot` draws: their metrics, and the units of their axes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.config import Config, ImageDataConfig
from icenet.core.data.datasets import sequence_length
from icenet.core.errors import IceNetError, UsageError
from icenet.core.report import canvas
from icenet.core.report.metrics import MetricsLog
from icenet.core.runs.run_folder import run_of

Curve = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class Run:
    """The metrics of a run."""

    name: str
    folder: Path
    records: list[dict[str, Any]]

    @property
    def unit(self) -> str:
        """Unit of the throughput: `tokens` or `images`."""
        units = ("images", "rows", "tokens")
        return next(
            (unit for unit in units if any(f"{unit}_per_second" in record for record in self.records)), "tokens"
        )

    @property
    def backends(self) -> list[tuple[float, str]]:
        """The backends in the order in which they trained the run, each with its first step."""
        steps = [(r["step"], str(r["backend"])) for r in self.records if "loss" in r and r.get("backend")]
        return [next(group) for _, group in itertools.groupby(sorted(steps), key=lambda pair: pair[1])]

    @property
    def changes(self) -> list[float]:
        """The first step after each change of backend."""
        return [step for step, _ in self.backends[1:]]

    def curve(self, key: str) -> Curve:
        """Returns the steps and finite values of a metric; the last value of a step that is recorded twice.

        `speed` is the throughput in tokens or images per second.
        """
        key = f"{self.unit}_per_second" if key == "speed" else key
        by_step = {record["step"]: record for record in self.records if key in record}
        return canvas.series(list(by_step.values()), key)

    def items_per_step(self) -> int:
        """Returns the number of tokens or images per step, from the run's configuration.

        Raises:
            IceNetError: The configuration cannot be read.
        """
        config = Config.from_yaml(self.folder / "config.yaml", trust_code=False)
        row = 1 if isinstance(config.data, ImageDataConfig) else sequence_length(config)
        return config.training.batch_size * row

    def seconds(self) -> Curve:
        """Returns steps and seconds of training since the start, without evaluations and pauses."""
        steps, speed = self.curve("speed")
        good = speed > 0
        steps, spent = steps[good], self.items_per_step() / speed[good]
        # a step without a record took as long as the next one with a record
        return steps, np.cumsum(spent * np.diff(steps, prepend=steps[0] - 1 if len(steps) else 0))


def read(paths: Sequence[Path]) -> list[Run]:
    """Reads the runs of several folders, each once. Their names are the shortest distinct ends of their paths.

    Raises:
        UsageError: A folder is not a run.
        IceNetError: A run has no metrics yet.
    """
    folders = list(dict.fromkeys(_folder(path).resolve() for path in paths))
    runs = []
    for folder, name in zip(folders, _names(folders), strict=True):
        file = folder / "metrics.jsonl"
        records = [r for r in MetricsLog.read(file) if isinstance(r.get("step"), (int, float))]
        damaged = MetricsLog.count_damaged(file)
        if not any("loss" in record or "validation_loss" in record for record in records):
            problem = f"; damaged lines: {damaged:,}; " if damaged else " yet; wait for one, or "
            raise IceNetError(f"{file}: contains no step{problem}leave the run out")
        if damaged:
            logging.getLogger("icenet").warning(f"{file}: damaged lines, left out: {damaged:,}")
        runs.append(Run(name, folder, records))
    return runs


def _folder(path: Path) -> Path:
    """Returns the folder of a run, given the folder, a checkpoint in it or its metrics.jsonl."""
    if path.name == "metrics.jsonl" and path.is_file():
        return path.parent
    if not path.exists():
        raise UsageError(f"{path}: no such run; icenet runs lists the runs")
    for folder in (path, run_of(path)):
        if folder is not None and (folder / "metrics.jsonl").is_file():
            return folder
    raise UsageError(f"{path}: contains no metrics.jsonl, so it is not a run with steps; leave it out")


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of the paths that are all different."""
    longest = max((len(folder.parts) for folder in folders), default=1)
    for length in range(1, longest + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
