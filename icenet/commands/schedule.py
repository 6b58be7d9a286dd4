"""`icenet info CONFIG --schedule`: the learning rate of every step, as a table, a sparkline and a picture."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icenet.core import backends
from icenet.core.config import Config
from icenet.core.config.training import TrainingConfig
from icenet.core.engine.parameter_groups import assign, gather
from icenet.core.errors import UsageError
from icenet.core.report import canvas
from icenet.core.report.console import new_console, print_line
from icenet.core.runs import open_model
from icenet.core.training.schedule import decay_start, learning_rate, length

_POINTS = 1000
_BLOCKS = "▁▂▃▄▅▆▇█"
_COLOURS = (canvas.ORANGE, canvas.GREEN, canvas.PURPLE)


@dataclass(frozen=True)
class GroupRow:
    """An optimizer group."""

    method: str
    learning_rate: float
    """Peak learning rate."""
    lr_scale: float
    weight_decay: float
    first: str
    tensors: int
    values: int

    @property
    def parameters(self) -> str:
        return self.first if self.tensors == 1 else f"{self.first} and {self.tensors - 1} more"


@dataclass(frozen=True)
class ScheduleReport:
    """The learning rate of every step. Steps are counted from 1, as in metrics.jsonl."""

    name: str
    training: TrainingConfig
    groups: list[GroupRow]
    run: Path | None = None

    def rate(self, step: int) -> float:
        """Returns the learning rate of step 1, 2, ... max_steps."""
        return learning_rate(step - 1, self.training)

    def rows(self) -> list[tuple[str, int, float]]:
        """Returns the rows of the table: name, step and learning rate, in order of steps."""
        last = self.training.max_steps
        named: dict[int, str] = {}
        for name, step in {"first": 1, **self.marks(), "last": last}.items():
            named[step] = f"{named[step]}, {name}" if step in named else name
        for name, part in (("a quarter", 1), ("half", 2), ("three quarters", 3)):
            named.setdefault(max(part * last // 4, 1), name)
        return [(name, step, self.rate(step)) for step, name in sorted(named.items())]

    def marks(self) -> dict[str, int]:
        """Returns the steps at which the schedule changes, by name."""
        training, found = self.training, {}
        if training.warmup_steps:
            found["end of warmup"] = min(training.warmup_steps, training.max_steps)
        decay = decay_start(training)
        if decay is not None:
            found["start of decay"] = max(decay, 1)
        if length(training) < training.max_steps and training.schedule not in ("constant", "inverse_sqrt"):
            found["end of the schedule"] = length(training)
        return found

    def points(self) -> tuple[list[int], list[float]]:
        """Returns about a thousand steps (all of a short run) and their learning rates."""
        last = self.training.max_steps
        steps = {1 + index * (last - 1) // max(_POINTS - 1, 1) for index in range(_POINTS)}
        chosen = sorted(steps | {step for _, step, _ in self.rows()})
        return chosen, [self.rate(step) for step in chosen]

    def sparkline(self, width: int = 60) -> str:
        """Returns the curve as a line of block characters, from zero to the highest rate."""
        last = self.training.max_steps
        count = min(width, last)
        steps = [1 + index * (last - 1) // max(count - 1, 1) for index in range(count)]
        top = max(self.points()[1])
        return "".join(_BLOCKS[round(self.rate(step) / top * (len(_BLOCKS) - 1))] for step in steps)

    def as_dict(self) -> dict[str, Any]:
        steps, rates = self.points()
        return {
            "name": self.name,
            "schedule": self.training.schedule,
            "max_steps": self.training.max_steps,
            "rows": [{"at": name, "step": step, "learning_rate": rate} for name, step, rate in self.rows()],
            "steps": steps,
            "learning_rates": rates,
            "groups": [{**vars(group)} for group in self.groups],
        }

    def render(self, picture: Path | None) -> None:
        """Prints the report. `picture` is the result of `draw`."""
        from rich.table import Table

        console = new_console()
        training = self.training
        title = f"{Path(self.name).stem}: {training.schedule}, {training.max_steps:,} steps"
        table = Table(title=title, title_style="bold")
        table.add_column("at")
        for column in ("step", "learning rate", "of the highest"):
            table.add_column(column, justify="right")
        for name, step, rate in self.rows():
            table.add_row(name, f"{step:,}", f"{rate:.3g}", f"{rate / training.learning_rate:.1%}")
        console.print(table)
        console.print(self.sparkline(), highlight=False)
        groups = Table(title=f"Parameters, optimizer {training.optimizer}", title_style="bold")
        groups.add_column("parameters", overflow="fold")
        for column in ("values", "method", "highest rate", "decay"):
            groups.add_column(column, justify="right", no_wrap=True)
        for group in self.groups:
            highest = f"{group.learning_rate:.3g}" if group.learning_rate else "frozen"
            groups.add_row(group.parameters, f"{group.values:,}", group.method, highest, f"{group.weight_decay:g}")
        console.print(groups)
        words = f"drawn in {picture}" if picture else "no picture: matplotlib is missing; pip install 'icenet[plot]'"
        print_line(console, words)

    def draw(self, path: Path | None = None, overwrite: bool = False) -> Path | None:
        """Draws the learning rate to `path`, by default schedule.png in the run's or the current folder.

        Returns:
            The path, or None if matplotlib is not installed.

        Raises:
            UsageError: The name does not end in .png, or it is a file that is not a picture of IceNet, without
                `overwrite`.
            IceNetError: The file cannot be written.
        """
        target = path or (self.run or Path()) / "schedule.png"
        if target.suffix.lower() != ".png":
            raise UsageError(f"{target}: the picture is a PNG; give --out NAME.png")
        target = canvas.output_file(target, overwrite)
        if not canvas.available():
            return None
        training, (steps, rates) = self.training, self.points()
        peak, least = _short(training.learning_rate), _short(training.min_learning_rate)
        title = f"{Path(self.name).stem}: {training.schedule}, {training.max_steps:,} steps"
        below = f"highest {peak}, after the warmup at least {least}"
        figure, (axes,) = canvas.new_figure((9, 4.4), [1], title, below, right=1.15)
        labels = {1.0: "the rest"}
        for group in self.groups:
            if group.lr_scale not in (0.0, 1.0):
                labels.setdefault(group.lr_scale, group.parameters)
        ends: list[tuple[float, str, str]] = []
        entries = []
        for factor, colour in zip(labels, itertools.cycle((canvas.BLUE, *_COLOURS)), strict=False):
            own = [rate * factor for rate in rates]
            line = axes.plot(steps, own, color=colour, linewidth=2.2, solid_joinstyle="round")[0]
            entries.append((line, labels[factor]))
            ends.append((own[-1], f"last {_short(own[-1])}", colour))
        axes.fill_between(steps, rates, color=canvas.BLUE, alpha=0.08, linewidth=0)
        most = max(labels)  # the marks are on the highest curve, the legend above all curves
        limit = max(rates) * most * (1.14 if len(labels) == 1 else 1.2 + 0.09 * len(labels))
        axes.set_ylim(0, limit)
        axes.set_xlim(1 - 0.01 * training.max_steps, training.max_steps)
        for name, step in self.marks().items():
            height = self.rate(step) * most
            axes.axvline(step, ymax=height / limit, color=canvas.INK, linewidth=0.9, dashes=(2, 2))
            right = step < 0.7 * training.max_steps
            axes.annotate(
                f"{name}, step {step:,}",
                (step, height),
                xytext=(0, 7),
                textcoords="offset points",
                ha="left" if right else "right",
                color=canvas.INK,
                fontsize=10,
            )
        if len(labels) > 1:
            canvas.add_legend(axes, entries, loc="upper right", edgecolor="none", fontsize=10, labelcolor=canvas.INK)
        axes.yaxis.set_major_formatter(lambda value, _: _short(value))
        axes.set_xlabel("step")
        axes.set_ylabel("learning rate")
        # labels must not overlap each other or the axis
        lowest = 0.06 * len(ends) * limit
        canvas.end_labels(axes, [(max(rate, lowest), text, colour) for rate, text, colour in ends])
        return canvas.save(figure, target)


def of_target(name: str, overrides: tuple[str, ...] = ()) -> ScheduleReport:
    """Returns the report of a config, a preset, a run or a checkpoint.

    Raises:
        ConfigError: It cannot be read, or a pattern of `training.parameter_groups` matches no parameter.
    """
    path = Path(name)
    config, _ = open_model.open_target(path, overrides)
    run = path if (path / "checkpoints").is_dir() else None
    return ScheduleReport(name, config.training, _groups(config), run)


def _groups(config: Config) -> list[GroupRow]:
    model, training = backends.meta_model(config), config.training
    fitted = model.trainable_paths()
    shapes = {path: shape for path, shape in model.weight_shapes().items() if path in fitted}
    groups = gather(assign(training, shapes, model.layer_kinds(), getattr(config.model, "vocab_size", None)))
    return [
        GroupRow(
            group.method,
            group.lr_scale * training.learning_rate,
            group.lr_scale,
            group.weight_decay,
            paths[0],
            len(paths),
            sum(math.prod(shapes[path]) for path in paths),
        )
        for group, paths in groups.items()
    ]


def _short(value: float) -> str:
    """Formats a number with three digits: 5e-4."""
    return f"{value:.3g}".replace("e-0", "e-")
