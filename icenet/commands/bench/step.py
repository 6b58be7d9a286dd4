"""`icenet bench step`: a step of our training loop against the framework's own minimal loop, for the same model."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icenet.commands.bench import process
from icenet.core import backends, engine
from icenet.core.config import Config
from icenet.core.training.trainer import Trainer

WARM_UP = 5
# what the bare loop has not: it fits with AdamW, and neither evaluates nor saves
_SAME = (
    "training.optimizer=adamw",
    "training.parameter_groups=[]",
    "training.gradient_accumulation=1",
    "training.max_grad_value=null",
    "training.ema_decay=null",
    "training.early_stopping=null",
    "training.keep_best=false",
    "training.eval_every=null",
    "training.warmup_steps=0",
    "training.schedule=constant",
    "training.min_learning_rate=0",
)


@dataclass(frozen=True)
class StepReport:
    """The figures of each backend."""

    name: str
    backends: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return {"config": self.name, "backends": self.backends}

    def render(self) -> None:
        lines = [
            {
                "backend": f"{found['backend']} {found['device']}",
                "bare loop, ms": f"{found['bare_ms']:.2f}",
                "icenet, ms": f"{found['icenet_ms']:.2f}",
                "ratio": f"{found['ratio']['median']:.3f}",
                "quartiles": f"{found['ratio']['low']:.3f} to {found['ratio']['high']:.3f}",
                "blocks": f"{found['blocks']} of {found['block']}",
            }
            for found in self.backends
        ]
        console = process.console()
        numbers = ("bare loop, ms", "icenet, ms", "ratio", "quartiles", "blocks")
        console.print(process.table(f"A training step, {self.name}", lines, numbers))
        console.print(
            "Blocks of both loops took turns in one process. icenet's steps read their batch, log loss, norm and "
            "speed, and show progress; the bare loop is given its batches and reads nothing.",
            soft_wrap=True,
        )
        for found in self.backends:
            if found["dropout"]:
                console.print(
                    f"{found['backend']}: dropout {found['dropout']:g}, keyed in icenet, the framework's own in the "
                    "bare loop; --set model.dropout=0 compares the loops alone",
                    soft_wrap=True,
                )


def run(
    name: str,
    overrides: Sequence[str] = (),
    backend: str | None = None,
    device: str | None = None,
    steps: int = 200,
    notify: Callable[[str], None] = lambda text: None,
) -> StepReport:
    """Measures `steps` steps of each loop on the backends that are here, each in a process of its own."""
    blocks = max(4, min(40, steps // 4))
    block = math.ceil(steps / blocks)
    keys = (f"training.max_steps={WARM_UP + blocks * block + 1}", "training.checkpoint_every=1000000000")
    config = Config.from_yaml(name, overrides).with_overrides(*_SAME, *keys)
    if hasattr(config.training, "tensorboard"):
        config = config.with_overrides("training.tensorboard=false")
    found = []
    for kind in process.backends_here(backend):
        notify(f"{kind}: {blocks} blocks of {block} steps of each loop")
        task = {"config": process.plain(config), "backend": kind, "device": device, "blocks": blocks, "block": block}
        found.append(process.measure_apart("step", task))
    return StepReport(name, found)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: milliseconds of a step of each loop, and their ratio block by block."""
    config = Config.from_dict(task["config"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer.start(config, Path(folder) / "run", backend=task["backend"], device=task["device"])
        room = backends.module(trainer.engine.backend, "tools.bench")
        turns = TakingTurns(trainer, room.BareLoop(config, trainer.engine.device), task["block"], task["blocks"])
        trainer.engine = turns  # type: ignore[assignment]
        trainer.fit()
    return {
        **process.machine(turns.engine.backend, turns.engine.device),
        "dropout": float(getattr(config.model, "dropout", 0.0)),
        "blocks": task["blocks"],
        "block": task["block"],
        "bare_ms": 1e3 * statistics.median(turns.bare_seconds),
        "icenet_ms": 1e3 * statistics.median(turns.own_seconds),
        "ratio": process.ratio(turns.own_seconds, turns.bare_seconds),
    }


class TakingTurns:
    """Stands between a trainer and its engine: where a block of steps begins, the other loop takes as many first.

    From there to the beginning of the next block the clock of the trainer runs: its steps with all that it does
    between them. Nobody's work is under way at a change: both sides wait for the device.
    """

    def __init__(self, trainer: Trainer, bare: Any, block: int, blocks: int) -> None:
        self.engine = trainer.engine
        self.own_seconds: list[float] = []
        """Seconds of a step of the trainer's, by block."""
        self.bare_seconds: list[float] = []
        """Seconds of a step of the bare loop's."""
        self._bare = bare
        self._dataset = trainer.dataset
        self._batch_size = trainer.config.training.batch_size
        self._block, self._blocks = block, blocks
        self._began = 0.0
        bare.run([self._dataset.train_batch(step, self._batch_size) for step in range(WARM_UP)])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def train_step(self, batch: engine.Batch, step: int, learning_rate: float, loss_scale: float = 1.0) -> Any:
        done, within = divmod(step - WARM_UP, self._block)
        if within == 0 and 0 <= done <= self._blocks:
            self._change(step, done)
        return self.engine.train_step(batch, step, learning_rate, loss_scale)

    def _change(self, step: int, done: int) -> None:
        self._bare.synchronize()
        if done:
            self.own_seconds.append((time.perf_counter() - self._began) / self._block)
        if done < self._blocks:
            batches = [self._dataset.train_batch(step + i, self._batch_size) for i in range(self._block)]
            begin = time.perf_counter()
            self._bare.run(batches)
            self.bare_seconds.append((time.perf_counter() - begin) / self._block)
        self._began = time.perf_counter()
