"""`icenet info`: parameter counts and memory of a model, or of all presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icenet.core import backends
from icenet.core.config import Config, CustomConfig, presets
from icenet.core.engine import parameter_groups
from icenet.core.report.console import new_console
from icenet.core.runs import open_model
from icenet.core.weights.packed import packed_of
from icenet.core.weights.quantization import Quantization, describe


@dataclass(frozen=True)
class ModelReport:
    """The size of a model.

    Attributes:
        name: The target: a config, run, checkpoint or saved model.
        config: Its configuration.
        num_params: Number of trainable parameters.
        parts: Number of values in each top-level part, trained or not, without running statistics.
        training_bytes: Bytes of the weights, gradients and optimizer state in fp32.
        shared: The owner's path of each further path of an array that the model shares; it is counted once.
        quantized: The settings of each layer that is quantized in the file.
        stored_bytes: Bytes of the weights in the file, if layers are quantized there.
    """

    name: str
    config: Config
    num_params: int
    parts: dict[str, int]
    training_bytes: int
    shared: dict[str, str] = field(default_factory=dict)
    quantized: dict[str, Quantization] = field(default_factory=dict)
    stored_bytes: int | None = None

    @property
    def num_values(self) -> int:
        """Number of values of all parts."""
        return sum(self.parts.values())

    def settings(self) -> dict[str, Any]:
        """Returns the options of the model. Those of a port are written by the user, and have an effect on it."""
        model = self.config.model
        options = model.model_dump()
        if isinstance(model, CustomConfig) and model.port is not None:
            shown = model.model_fields_set.difference(model.without_effect_on_ports)
            return {key: value for key, value in options.items() if key in shown}
        return options

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": self.settings(),
            "num_params": self.num_params,
            "bytes": {"fp32": 4 * self.num_values, "fp16": 2 * self.num_values},
            "training_bytes": self.training_bytes,
            "parts": self.parts,
            "shared": self.shared,
            "quantized": {path: found._asdict() for path, found in self.quantized.items()},
            "stored_bytes": self.stored_bytes,
        }

    def render(self) -> None:
        from rich.table import Table

        console = new_console()
        table = Table(title=self.name, title_style="bold")
        table.add_column("part", overflow="fold")
        table.add_column("parameters", justify="right")
        table.add_column("share", justify="right")
        for part, size in self.parts.items():
            table.add_row(part, f"{size:,}", f"{size / self.num_values:.1%}")
        table.add_section()
        table.add_row("total", f"{self.num_values:,}", "")
        console.print(table)
        if self.num_params != self.num_values:
            console.print(f"{self.num_params:,} are trained; the others are buffers or frozen", highlight=False)
        for path, owner in self.shared.items():
            console.print(f"{path} is tied to {owner}", highlight=False)
        if self.quantized and self.stored_bytes is not None:
            bits = 8 * self.stored_bytes / self.num_values
            console.print(
                f"quantized: {describe(self.quantized)}; {_megabytes(self.stored_bytes)} in the file, "
                f"{bits:.1f} bits per value",
                highlight=False,
            )
        console.print("  ".join(f"{key}={value}" for key, value in self.settings().items()), highlight=False)
        console.print(
            f"weights {_megabytes(4 * self.num_values)} in fp32, {_megabytes(2 * self.num_values)} in fp16; "
            f"training with {self.config.training.optimizer} needs {_megabytes(self.training_bytes)} in fp32 "
            "(weights, gradients, optimizer state) plus activations",
            highlight=False,
        )


@dataclass(frozen=True)
class PresetReport:
    """The sizes of all presets, with the figures of the model guide."""

    rows: list[dict[str, Any]]

    def as_dict(self) -> list[dict[str, Any]]:
        return self.rows

    def render(self) -> None:
        from rich.table import Table

        table = Table(title="Presets, compared with the model guide", title_style="bold")
        table.add_column("preset", no_wrap=True)
        for column in ("parameters", "guide", "fp16", "guide", "within"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            in_guide = row["guide_params"] is not None
            table.add_row(
                row["preset"],
                f"{row['num_params']:,}",
                f"~{row['guide_params'] / 1e6:,.0f} M" if in_guide else "",
                _megabytes(row["fp16_bytes"]),
                f"~{_megabytes(row['guide_bytes'])}" if in_guide else "",
                ("yes" if row["fp16_bytes"] <= row["guide_bytes"] else "no") if in_guide else "",
            )
        new_console().print(table)


def model_report(name: str, overrides: tuple[str, ...] = ()) -> ModelReport:
    """Returns the size of a config, a preset, a run, a checkpoint or a saved model."""
    config, weights = open_model.open_target(Path(name), overrides)
    model = backends.meta_model(config)
    trained = model.trainable_paths()
    shapes = {path: shape for path, shape in model.weight_shapes().items() if path in trained}
    vocab_size = getattr(config.model, "vocab_size", None)
    groups = parameter_groups.assign(config.training, shapes, model.layer_kinds(), vocab_size)
    state = parameter_groups.state_values(config.training, groups, shapes)
    parts = model.part_sizes()
    size = 4 * (sum(parts.values()) + model.num_params + state)  # weights, gradients, optimizer state
    packed = packed_of(weights)
    quantized = {} if packed is None else dict(packed.layers)
    stored = None if packed is None else sum(packed.spec(path).nbytes for path in packed)
    return ModelReport(name, config, model.num_params, parts, size, model.shared_arrays(), quantized, stored)


def presets_report() -> PresetReport:
    """Returns the sizes of all presets, those of the model guide first."""
    rows = []
    names = presets.names()
    for name in [*(name for name in presets.GUIDE if name in names), *(n for n in names if n not in presets.GUIDE)]:
        config = Config.from_yaml(name)
        model = backends.meta_model(config)
        guide = presets.GUIDE.get(name)
        rows.append(
            {
                "preset": name,
                "type": config.model.type,
                "num_params": model.num_params,
                "fp16_bytes": model.memory("fp16"),
                "guide_params": guide[0] if guide else None,
                "guide_bytes": guide[1] if guide else None,
            }
        )
    return PresetReport(rows)


def _megabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
