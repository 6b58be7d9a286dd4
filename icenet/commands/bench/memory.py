"""`icenet bench memory`: the peak memory of a training step, with and without gradient checkpointing."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from icenet.commands.bench import common
from icenet.commands.overrides import warn_of_replaced
from icenet.core import backends
from icenet.core.config import Config
from icenet.core.data.datasets import dataset_for
from icenet.core.errors import UsageError
from icenet.core.report import canvas
from icenet.core.training.schedule import learning_rate

# glibc keeps freed memory for reuse, which would count as used; these settings return it to the system at once
_GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_HALF_PRECISION = (
    "Half precision halves the activations and the copies of the weights that matrix products use. The weights, "
    "gradients and optimizer state stay in fp32."
)
_HALF_PRECISION_ON_CPU = (
    "On a CPU it saves less: matrix products are computed in fp32 there, from copies that are kept for the backward "
    "pass."
)


@dataclass(frozen=True)
class MemoryReport:
    """The measured memory.

    Attributes:
        name: The config.
        rows: One measurement each: `backend`, `device`, `depth`, `precision`, `checkpointing`, and bytes:
            `weights`, `optimizer`, `gradients`, `activations`, `peak`.
        picture: The file of the plot; None if there is none.
        plot_problem: Why a plot of several depths could not be drawn.
    """

    name: str
    rows: list[dict[str, Any]]
    picture: Path | None = None
    plot_problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        picture = str(self.picture) if self.picture else None
        return {"config": self.name, "rows": self.rows, "ratios": self.ratios(), "picture": picture}

    def ratios(self) -> list[dict[str, Any]]:
        """Returns, per backend, precision and depth, the peak with gradient checkpointing divided by that without."""
        keys = ("backend", "precision", "depth")
        plain = {tuple(row[key] for key in keys): row["peak"] for row in self.rows if not row["checkpointing"]}
        ratios = []
        for row in self.rows:
            base = plain.get(tuple(row[key] for key in keys))
            if row["checkpointing"] and base:
                ratios.append({**{key: row[key] for key in keys}, "ratio": row["peak"] / base})
        return ratios

    def render(self) -> None:
        parts = ("weights", "optimizer", "gradients", "activations", "peak")
        rows = [
            {
                "backend": f"{row['backend']} {row['device']}",
                "layers": str(row["depth"] or ""),
                "precision": row["precision"],
                "checkpointing": "yes" if row["checkpointing"] else "no",
                **{part: f"{row[part] / 1e6:,.1f}" for part in parts},
            }
            for row in self.rows
        ]
        console = common.console()
        console.print(common.table(f"Peak memory of a training step in MB, {self.name}", rows, parts))
        for ratio in self.ratios():
            depth = f", {ratio['depth']} layers" if ratio["depth"] else ""
            console.print(
                f"{ratio['backend']} {ratio['precision']}{depth}: peak with gradient checkpointing "
                f"{ratio['ratio']:.2f} of the peak without",
                soft_wrap=True,
            )
        if any(row["precision"] != "fp32" for row in self.rows):
            console.print(_HALF_PRECISION, soft_wrap=True)
        if any(row["precision"] != "fp32" and row["device"] == "cpu" for row in self.rows):
            console.print(_HALF_PRECISION_ON_CPU, soft_wrap=True)
        sources = sorted({f"{row['backend']}: {row['source']}" for row in self.rows})
        console.print(
            "Weights, gradients and optimizer state are counted from their shapes. The column activations is the "
            f"rest of the peak, with all temporary buffers of the step. Source of the peak: {'; '.join(sources)}.",
            soft_wrap=True,
        )
        if self.picture or self.plot_problem:
            console.print(f"plot  {self.picture or f'none: {self.plot_problem}'}", soft_wrap=True)


def run(
    name: str,
    overrides: Sequence[str] = (),
    backend: str | None = None,
    device: str | None = None,
    precisions: Sequence[str] = ("fp32", "bf16"),
    depths: Sequence[int] = (),
    out: Path | None = None,
    notify: common.Notify = common.ignore,
    overwrite: bool = False,
) -> MemoryReport:
    """Measures the peak memory of a training step on each installed backend.

    Args:
        name: A YAML file or a preset.
        overrides: `KEY=VALUE` changes to it.
        backend: The only backend to measure.
        device: The device; the config's device if absent.
        precisions: Values of `training.mixed_precision`.
        depths: Values of `model.num_layers`; the config's own if empty.
        out: The file of the plot, which needs several depths.
        notify: Receives a line of progress before each measurement.
        overwrite: Whether to replace a file that is not a picture of IceNet.

    Raises:
        UsageError: `depths` for a model without `num_layers`, `out` without several depths, or `out` is another file.
    """
    replaced = {
        "training.mixed_precision": f"--precision {','.join(precisions)}",
        "training.gradient_checkpointing": "each step is measured with and without it",
        "model.num_layers": f"--depth {','.join(map(str, depths))}" if depths else None,
    }
    warn_of_replaced(overrides, {**common.chosen_by_options(backend, device), **replaced})
    config = Config.from_yaml(name, overrides)
    if depths and not hasattr(config.model, "num_layers"):
        raise UsageError(f"--depth: model.type {config.model.type} has no num_layers")
    if out is not None and len(depths) < 2:
        raise UsageError("--out is the plot of several depths: add --depth, e.g. --depth 4,8,16,24")
    picture = canvas.output_file(out or Path("bench-memory.png"), overwrite) if len(depths) > 1 else None
    measurements = list(
        itertools.product(common.installed_backends(backend), depths or (None,), precisions, (False, True))
    )
    rows = []
    for number, (kind, depth, precision, checkpointing) in enumerate(measurements, 1):
        layers = f", {depth} layers" if depth else ""
        mode = "with" if checkpointing else "without"
        notify(f"{number} of {len(measurements)}: {kind} {precision}{layers}, {mode} gradient checkpointing")
        changes = [
            f"training.mixed_precision={precision}",
            f"training.gradient_checkpointing={str(checkpointing).lower()}",
            *([f"model.num_layers={depth}"] if depth else []),
        ]
        task = {"config": common.json_config(config.with_overrides(*changes)), "backend": kind, "device": device}
        row = common.measure_isolated("memory", task, _GLIBC if sys.platform == "linux" else None)
        row["depth"] = depth or getattr(config.model, "num_layers", None)
        rows.append({**row, "precision": precision, "checkpointing": checkpointing})
    if picture is None:
        return MemoryReport(name, rows)
    return MemoryReport(name, rows, *canvas.attempt(partial(draw, name, rows, picture)))


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Returns the bytes of the parts and of the peak of one training step. Runs in a separate process."""
    config = Config.from_dict(task["config"])
    tools = backends.module(backends.choose(config, task["backend"]), "tools.bench")
    engine = backends.engine(config, task["backend"], task["device"])
    batch = dataset_for(config).train_batch(0, config.training.batch_size)
    rate = learning_rate(0, config.training)
    # the first step allocates code, threads and workspaces; the smallest possible batch keeps it below the second
    smallest = {key: array[: config.training.gradient_accumulation] for key, array in batch.items()}
    engine.read(engine.train_step(smallest, 0, rate))
    gauge = tools.Gauge(engine)
    gauge.begin()
    engine.read(engine.train_step(batch, 1, rate))
    growth = gauge.growth()
    weights = sum(array.nbytes for array in engine.weights().values())
    optimizer = sum(array.nbytes for array in engine.optimizer_state().values())
    gradients = 4 * engine.model.num_params
    return {
        **common.machine(engine.backend, engine.device),
        "source": gauge.source,
        "weights": weights,
        "optimizer": optimizer,
        "gradients": gradients,
        "activations": max(growth - gradients, 0),
        "peak": weights + optimizer + growth,
    }


def draw(name: str, rows: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """Plots the peak against the depth and returns the file; None if matplotlib is not installed."""
    if not canvas.available():
        return None
    figure, (axes,) = canvas.new_figure((9, 5.4), [1.0], f"Peak memory of a training step, {name}", right=2.2)
    colours = {"mlx": canvas.BLUE, "torch": canvas.ORANGE}
    dashes = {"fp32": "-", "bf16": (0, (5, 2)), "fp16": (0, (1.5, 1.5))}
    has_precisions = len({row["precision"] for row in rows}) > 1
    curves: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["depth"] or 0):
        curves.setdefault((row["backend"], row["precision"], row["checkpointing"]), []).append(row)
    labels = []
    for (backend, precision, checkpointing), curve in curves.items():
        colour, peaks = colours[backend], [row["peak"] / 1e6 for row in curve]
        axes.plot(
            [row["depth"] or 0 for row in curve],
            peaks,
            color=colour,
            linestyle=dashes[precision],
            linewidth=1.8,
            marker="s" if checkpointing else "o",
            markersize=6,
            markerfacecolor="white" if checkpointing else colour,
        )
        label = f"{backend} {precision}" if has_precisions else backend
        labels.append((peaks[-1], f"{label}, {'checkpointing' if checkpointing else 'plain'}", colour))
    axes.set_ylim(0, 1.08 * max(row["peak"] for row in rows) / 1e6)
    depths = sorted({row["depth"] or 0 for row in rows})
    axes.set_xlim(0, 1.02 * depths[-1] or 1)
    axes.set_xticks(depths)
    axes.set_xlabel("layers")
    axes.set_ylabel("peak (MB)")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.9g}")
    canvas.end_labels(axes, labels, 0.06)
    return canvas.save(figure, path)
