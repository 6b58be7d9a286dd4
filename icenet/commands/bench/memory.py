"""`icenet bench memory`: peak memory of a training step, by precision, with gradient checkpointing and without."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icenet.commands.bench import process
from icenet.core import backends
from icenet.core.config import Config
from icenet.core.data.datasets import dataset_for
from icenet.core.errors import UsageError
from icenet.core.report import canvas
from icenet.core.training.schedule import learning_rate

PRECISIONS = ("fp32", "bf16", "fp16")
# glibc keeps freed memory for later, which would count; with these it goes back at once
_GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
HALF = (
    "Half precision halves activations and the copies of weights that products are computed from. The weights "
    "themselves, their gradients and the optimizer's moments stay in fp32."
)
SIMULATED = "On a CPU it saves less: products are computed in fp32 there, from copies that the backward pass keeps."


@dataclass(frozen=True)
class MemoryReport:
    """What was measured: one row a process."""

    name: str
    rows: list[dict[str, Any]]
    picture: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        picture = str(self.picture) if self.picture else None
        return {"config": self.name, "rows": self.rows, "ratios": self.ratios(), "picture": picture}

    def ratios(self) -> list[dict[str, Any]]:
        """Of each backend, precision and depth: the peak with checkpointing as a share of that without."""
        key = ("backend", "precision", "depth")
        without = {tuple(row[k] for k in key): row["peak"] for row in self.rows if not row["checkpointing"]}
        found = []
        for row in self.rows:
            base = without.get(tuple(row[k] for k in key))
            if row["checkpointing"] and base:
                found.append({**{k: row[k] for k in key}, "ratio": row["peak"] / base})
        return found

    def render(self) -> None:
        parts = ("weights", "optimizer", "gradients", "activations", "peak")
        lines = [
            {
                "backend": f"{row['backend']} {row['device']}",
                "layers": str(row["depth"] or ""),
                "type": row["precision"],
                "checkpoint": "yes" if row["checkpointing"] else "no",
                **{part: f"{row[part] / 1e6:,.1f}" for part in parts},
            }
            for row in self.rows
        ]
        console = process.console()
        console.print(process.table(f"Peak memory of a training step in MB, {self.name}", lines, parts))
        for found in self.ratios():
            depth = f", {found['depth']} layers" if found["depth"] else ""
            console.print(
                f"{found['backend']} {found['precision']}{depth}: with gradient checkpointing "
                f"{found['ratio']:.2f} of the peak without",
                soft_wrap=True,
            )
        if any(row["precision"] != "fp32" for row in self.rows):
            console.print(HALF, soft_wrap=True)
        if any(row["precision"] != "fp32" and row["device"] == "cpu" for row in self.rows):
            console.print(SIMULATED, soft_wrap=True)
        console.print(
            "weights, optimizer and gradients are counted; activations, with all that lives for a part of the step, "
            "are what is left of the peak. Measured by: "
            + "; ".join(sorted({f"{row['backend']}: {row['source']}" for row in self.rows})),
            soft_wrap=True,
        )
        if self.picture:
            console.print(f"picture  {self.picture}", soft_wrap=True)


def run(
    name: str,
    overrides: Sequence[str] = (),
    backend: str | None = None,
    device: str | None = None,
    precisions: Sequence[str] = ("fp32", "bf16"),
    depths: Sequence[int] = (),
    out: Path | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> MemoryReport:
    """Measures a configuration on the backends that are here, at its own depth or at several.

    Raises:
        UsageError: the model has no `num_layers`, and depths were asked for.
    """
    config = Config.from_yaml(name, overrides)
    if depths and not hasattr(config.model, "num_layers"):
        raise UsageError(f"--depth: model.type {config.model.type} has no num_layers")
    if out is not None:
        if len(depths) < 2:
            raise UsageError("--out is the picture of several depths: give --depth as well, as --depth 4,8,16,24")
        canvas.check_suffix(out)
    wanted = [
        (kind, depth, precision, checkpointing)
        for kind in process.backends_here(backend)
        for depth in depths or (None,)
        for precision in precisions
        for checkpointing in (False, True)
    ]
    rows = []
    for number, (kind, depth, precision, checkpointing) in enumerate(wanted, 1):
        saving = "with" if checkpointing else "without"
        layers = f", {depth} layers" if depth else ""
        notify(f"{number} of {len(wanted)}: {kind} {precision}{layers}, {saving} gradient checkpointing")
        keys = [f"training.mixed_precision={precision}"]
        keys += [f"training.gradient_checkpointing={'true' if checkpointing else 'false'}"]
        keys += [f"model.num_layers={depth}"] if depth else []
        task = {"config": process.plain(config.with_overrides(*keys)), "backend": kind, "device": device}
        found = process.measure_apart("memory", task, _GLIBC if sys.platform == "linux" else None)
        found["depth"] = depth or getattr(config.model, "num_layers", None)
        rows.append({**found, "precision": precision, "checkpointing": checkpointing})
    picture = None
    if len(depths) > 1:
        picture = draw(name, rows, out or Path("bench-memory.png"))
    return MemoryReport(name, rows, picture)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: bytes of the parts, and of the peak of one step."""
    config = Config.from_dict(task["config"])
    room = backends.module(backends.choose(config, task["backend"]), "tools.bench")
    engine = backends.engine(config, task["backend"], task["device"])
    batch = dataset_for(config).train_batch(0, config.training.batch_size)
    rate = learning_rate(0, config.training)
    # the first step brings in code, threads and workspaces: it is taken with as few rows as there can be
    few = {key: array[: config.training.gradient_accumulation] for key, array in batch.items()}
    engine.read(engine.train_step(few, 0, rate))
    gauge = room.Gauge(engine)
    gauge.begin()
    engine.read(engine.train_step(batch, 1, rate))
    growth = gauge.growth()
    weights = sum(array.nbytes for array in engine.weights().values())
    optimizer = sum(array.nbytes for array in engine.optimizer_state().values())
    gradients = 4 * engine.model.num_params
    return {
        **process.machine(engine.backend, engine.device),
        "source": gauge.source,
        "weights": weights,
        "optimizer": optimizer,
        "gradients": gradients,
        "activations": max(growth - gradients, 0),
        "peak": weights + optimizer + growth,
    }


def draw(name: str, rows: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """The peak against depth; None where matplotlib is missing."""
    if not canvas.available():
        return None
    figure, (axes,) = canvas.new_figure((9, 5.4), [1.0], f"Peak memory of a training step, {name}", right=2.2)
    colours = {"mlx": canvas.BLUE, "torch": canvas.ORANGE}
    dashes = {"fp32": "-", "bf16": (0, (5, 2)), "fp16": (0, (1.5, 1.5))}
    several = len({row["precision"] for row in rows}) > 1
    ends = []
    for row in rows:
        same = [r for r in rows if all(r[k] == row[k] for k in ("backend", "precision", "checkpointing"))]
        if row is not same[0]:
            continue
        same.sort(key=lambda r: r["depth"] or 0)
        colour, values = colours[row["backend"]], [r["peak"] / 1e6 for r in same]
        marker = "s" if row["checkpointing"] else "o"
        face = "white" if row["checkpointing"] else colour
        axes.plot(
            [r["depth"] or 0 for r in same],
            values,
            color=colour,
            linestyle=dashes[row["precision"]],
            linewidth=1.8,
            marker=marker,
            markersize=6,
            markerfacecolor=face,
        )
        label = f"{row['backend']} {row['precision'] if several else ''}".strip()
        how = "checkpointing" if row["checkpointing"] else "plain"
        ends.append((values[-1], f"{label}, {how}", colour))
    axes.set_ylim(0, 1.08 * max(row["peak"] for row in rows) / 1e6)
    depths = sorted({row["depth"] or 0 for row in rows})
    axes.set_xlim(0, 1.02 * depths[-1] or 1)
    axes.set_xticks(depths)
    axes.set_xlabel("layers")
    axes.set_ylabel("peak (MB)")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    canvas.end_labels(axes, ends, 0.06)
    return canvas.save(figure, path)
