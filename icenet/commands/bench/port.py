"""`icenet bench port`: models that `icenet.port` made, next to IceNet's own with the same weights, on MLX."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import icenet
from icenet.commands import isolated
from icenet.commands.bench import common
from icenet.core import backends
from icenet.core.errors import IceNetError

MODELS = ("resnet50", "gpt2")
"""torchvision's ResNet-50, and the GPT-2 of transformers with 124M parameters."""
SIZES = {"resnet50": {"gpu": (32, 224), "cpu": (2, 64)}, "gpt2": {"gpu": (8, 512), "cpu": (2, 64)}}
"""Rows of a batch, and tokens of a row or height and width of the images."""
WORK = {"forward": ("forward", False), "forward, compiled": ("forward", True)} | {
    "training step": ("step", False),
    "training step, compiled": ("step", True),
}
"""What is timed: the method of a side, and whether MLX compiles it."""
SAME = 0.02
"""Largest difference of logits, relative to the largest one, that is rounding: TF32 and bf16 included."""


@dataclass(frozen=True)
class PortReport:
    """The times of each model: of the port (`port_ms`), of IceNet's own model (`own_ms`), and their `ratio`."""

    models: list[dict[str, Any]]

    def as_dict(self) -> list[dict[str, Any]]:
        return self.models

    def render(self) -> None:
        rows = [
            {
                "model": f"{result['model']}, {result['batch']} x {result['length']}, {result['precision']}",
                "work": work,
                "IceNet, ms": common.rounded(result[work]["own_ms"]),
                "port, ms": common.rounded(result[work]["port_ms"]),
                "port / IceNet": f"{result[work]['ratio']['median']:.2f}",
                "quartiles": f"{result[work]['ratio']['low']:.2f} to {result[work]['ratio']['high']:.2f}",
            }
            for result in self.models
            for work in WORK
            if work in result
        ]
        output = common.console()
        output.print(common.table("Ports next to IceNet's own models, MLX", rows, list(rows[0])[2:]))
        for result in self.models:
            text = f"{result['model']}: ported and proved in {result['port_s']:.0f} s on {result['device']}"
            output.print(text, soft_wrap=True, markup=False)


def run(
    models: list[str],
    device: str | None = None,
    batch: int | None = None,
    length: int | None = None,
    precision: str = "fp32",
    rounds: int = 9,
    layers: int = 12,
    notify: common.Notify = common.ignore,
) -> PortReport:
    """Ports models, and times each next to IceNet's own model with the same weights, in turn in one process.

    Args:
        models: Names of `MODELS`.
        device: auto, cpu or gpu.
        batch, length: Rows of a batch, and tokens of a row or height and width of the images; None: see `SIZES`.
        precision: fp32 or bf16, of the weights and the arithmetic of both.
        rounds: Number of repetitions.
        layers: Number of layers of GPT-2.
        notify: Receives a line of progress for each step of the work.

    Raises:
        IceNetError: A package is missing, or a measurement failed.
    """
    found = []
    for model in models:
        sizes = {"batch": batch, "length": length, "layers": layers}
        task = {"model": model, "device": device or "auto", "precision": precision, **sizes}
        notify(f"{model}: ports and proves it")
        try:
            with isolated.Worker(__name__, "Session", task) as worker:
                result = worker.call("machine")
                for work in WORK:
                    notify(f"{model}: {work} (rounds: {rounds})")
                    result[work] = worker.call("time", work, rounds)
        except isolated.IsolatedError as error:
            raise IceNetError(f"bench port on mlx: {error}") from None
        found.append(result)
    return PortReport(found)


class Session:
    """A port and IceNet's own model with the same weights, in a process of their own.

    Args:
        task: The arguments of `run`, for one model.

    Raises:
        IceNetError: A package is missing, or the two compute other logits.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        for backend in ("mlx", "torch"):
            backends.resolve(backend)
        tools, originals = backends.module("mlx", "tools.ports"), backends.module("torch", "tools.originals")
        kind = "gpu" if tools.is_gpu(task["device"]) else "cpu"
        rows, length = SIZES[task["model"]][kind]
        rows, length = task["batch"] or rows, task["length"] or length
        draws = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if task["model"] == "resnet50":
                module, example = originals.resnet50(folder)
                own = icenet.build("resnet-50", backend="mlx", device=task["device"])
                icenet.convert(folder / "weights.safetensors", folder / "mlx.safetensors", "mlx", model=own)
                own.load_weights(str(folder / "mlx.safetensors"))
                icenet.save(own, folder / "own")
                own = icenet.load(folder / "own", "mlx", task["device"], dtype=task["precision"])
                images = draws.standard_normal((rows, length, length, 3), np.float32)
                inputs, labels = [images, images.transpose(0, 3, 1, 2).copy()], draws.integers(0, 1000, rows)
            else:
                module, example = originals.gpt2(folder, task["layers"])
                own = icenet.load(folder, "mlx", task["device"], dtype=task["precision"])
                tokens, labels = draws.integers(0, module.config.vocab_size, (2, rows, length), np.int32)
                inputs = [tokens, tokens]
            begin = time.perf_counter()
            port = icenet.port(module, (), example_kwargs=example).module
            port_s = time.perf_counter() - begin
        precision = task["precision"]
        self._sides = {
            "own": tools.Side(own, own, inputs[0], labels.astype(np.int32), precision),
            "port": tools.Side(port, tools.calls(port), inputs[1], labels.astype(np.int32), precision),
        }
        logits = [side.logits() for side in self._sides.values()]
        if not np.abs(logits[0] - logits[1]).max() <= SAME * np.abs(logits[0]).max():
            raise IceNetError(f"the port of {task['model']} and IceNet's model give other logits")
        self._machine = {**common.machine("mlx", kind), "model": task["model"], "batch": rows, "length": length}
        self._machine |= {"precision": precision, "port_s": port_s}

    def machine(self) -> dict[str, Any]:
        """Returns the machine, the model with its sizes, and the seconds that porting took."""
        return self._machine

    def time(self, work: str, rounds: int) -> dict[str, Any]:
        """Returns the medians of the milliseconds of both for one of `WORK`, and their ratio."""
        method, compiled = WORK[work]
        functions = {name: getattr(side, method)(compiled) for name, side in self._sides.items()}
        times = common.time_interleaved(functions, rounds)
        return {
            **{f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()},
            "ratio": common.ratio(times["port"], times["own"]),
        }
