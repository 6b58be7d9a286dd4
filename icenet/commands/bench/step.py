"""`icenet bench step`: a step of the training loop against a minimal loop written with the framework alone."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icenet.commands.bench import common
from icenet.commands.overrides import warn_of_replaced
from icenet.core import backends
from icenet.core.config import Config
from icenet.core.engine import Batch
from icenet.core.training.trainer import Trainer

WARM_UP = 5
"""Steps of each loop before the first timed block."""
# the minimal loop uses AdamW with a constant learning rate, and neither evaluates nor saves
_SAME_WORK = (
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
    "training.tensorboard=false",
    "training.checkpoint_every=1000000000",
)


@dataclass(frozen=True)
class StepReport:
    """The times of each backend: `bare_ms` of the minimal loop, `icenet_ms`, their `ratio`."""

    name: str
    backends: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return {"config": self.name, "backends": self.backends}

    def render(self) -> None:
        rows = [
            {
                "backend": f"{result['backend']} {result['device']}",
                "minimal loop, ms": f"{result['bare_ms']:.2f}",
                "icenet, ms": f"{result['icenet_ms']:.2f}",
                "ratio": f"{result['ratio']['median']:.3f}",
                "quartiles": f"{result['ratio']['low']:.3f} to {result['ratio']['high']:.3f}",
                "blocks": f"{result['blocks']} of {result['block']} steps",
            }
            for result in self.backends
        ]
        console = common.console()
        numbers = ("minimal loop, ms", "icenet, ms", "ratio", "quartiles", "blocks")
        console.print(common.table(f"A training step, {self.name}", rows, numbers))
        console.print(
            "Blocks of steps of the two loops alternate in one process. icenet's steps include reading the batch, "
            "the log and the progress bar; the minimal loop receives its batches and reports nothing.",
            soft_wrap=True,
        )
        for result in self.backends:
            if result["dropout"]:
                console.print(
                    f"{result['backend']}: dropout {result['dropout']:g} is keyed in icenet and the framework's own "
                    "in the minimal loop; --set model.dropout=0 compares the loops alone",
                    soft_wrap=True,
                )


def run(
    name: str,
    overrides: Sequence[str] = (),
    backend: str | None = None,
    device: str | None = None,
    steps: int = 200,
    notify: common.Notify = common.ignore,
) -> StepReport:
    """Times `steps` steps of each loop on each installed backend, or on the given one.

    Args:
        name: A YAML file or a preset.
        overrides: `KEY=VALUE` changes to it.
        backend: The only backend to measure.
        device: The device; the config's device if absent.
        steps: Number of steps of each loop, rounded up to whole blocks.
        notify: Receives a line of progress per backend.
    """
    blocks = max(4, min(40, steps // 4))
    block = math.ceil(steps / blocks)
    max_steps = WARM_UP + blocks * block + 1
    same = {setting.partition("=")[0]: setting for setting in _SAME_WORK if setting not in overrides}
    timed = {key: f"the loops are timed with {setting}" for key, setting in same.items()}
    chosen = common.chosen_by_options(backend, device)
    warn_of_replaced(overrides, {**chosen, **timed, "training.max_steps": f"--steps {steps}"})
    config = Config.from_yaml(name, overrides).with_overrides(*_SAME_WORK, f"training.max_steps={max_steps}")
    results = []
    for kind in common.installed_backends(backend):
        notify(f"{kind}: {blocks} blocks of {block} steps of each loop")
        task = {"config": common.json_config(config), "backend": kind, "device": device}
        results.append(common.measure_isolated("step", {**task, "blocks": blocks, "block": block}))
    return StepReport(name, results)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Returns the milliseconds of a step of each loop and their ratio, block by block. Runs in a separate process."""
    config = Config.from_dict(task["config"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer.start(config, Path(folder) / "run", backend=task["backend"], device=task["device"])
        tools = backends.module(trainer.engine.backend, "tools.bench")
        bare_loop = tools.BareLoop(config, trainer.engine.device)
        engine = AlternatingEngine(trainer, bare_loop, task["block"], task["blocks"])
        trainer.engine = engine  # type: ignore[assignment]
        trainer.fit()
    return {
        **common.machine(engine.engine.backend, engine.engine.device),
        "dropout": float(getattr(config.model, "dropout", 0.0)),
        "blocks": task["blocks"],
        "block": task["block"],
        "bare_ms": 1e3 * statistics.median(engine.bare_seconds),
        "icenet_ms": 1e3 * statistics.median(engine.own_seconds),
        "ratio": common.ratio(engine.own_seconds, engine.bare_seconds),
    }


class AlternatingEngine:
    """A trainer's engine that runs and times a block of the minimal loop before each block of the trainer's steps.

    A block of the trainer is timed from its first step to the first step of the next block, so that it includes what
    the trainer does between steps. The device is idle at each change.

    Attributes:
        own_seconds: Seconds per step of the trainer, by block.
        bare_seconds: Seconds per step of the minimal loop, by block.
    """

    def __init__(self, trainer: Trainer, bare_loop: Any, block: int, blocks: int) -> None:
        self.engine = trainer.engine
        self.own_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self._bare_loop = bare_loop
        self._dataset = trainer.dataset
        self._batch_size = trainer.config.training.batch_size
        self._block, self._blocks = block, blocks
        self._begin = 0.0
        bare_loop.run(self._batches(0, WARM_UP))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def train_step(self, batch: Batch, step: int, learning_rate: float, loss_scale: float = 1.0) -> Any:
        completed, within = divmod(step - WARM_UP, self._block)
        if within == 0 and 0 <= completed <= self._blocks:
            self._alternate(step, completed)
        return self.engine.train_step(batch, step, learning_rate, loss_scale)

    def _alternate(self, step: int, completed: int) -> None:
        """Ends a block of the trainer, if there was one, and runs the next block of the minimal loop."""
        self._bare_loop.synchronize()
        if completed:
            self.own_seconds.append((time.perf_counter() - self._begin) / self._block)
        if completed < self._blocks:
            batches = self._batches(step, self._block)
            begin = time.perf_counter()
            self._bare_loop.run(batches)
            self.bare_seconds.append((time.perf_counter() - begin) / self._block)
        self._begin = time.perf_counter()

    def _batches(self, first: int, count: int) -> list[Batch]:
        return [self._dataset.train_batch(first + index, self._batch_size) for index in range(count)]
