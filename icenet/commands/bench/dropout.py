"""`icenet bench dropout`: keyed dropout, which has the same masks on both backends, against the framework's own."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from icenet.commands.bench import common
from icenet.core import backends, rng

SHAPE = (32, 512, 512)
P = 0.1
PASSES = {"forward": False, "forward and backward": True}
"""The passes that are timed, and whether each includes the backward pass."""


@dataclass(frozen=True)
class DropoutReport:
    """The times of each backend: per pass `own_ms`, `keyed_ms` and their `ratio`."""

    backends: list[dict[str, Any]]

    def as_dict(self) -> list[dict[str, Any]]:
        return self.backends

    def render(self) -> None:
        rows = [
            {
                "backend": f"{result['backend']} {result['device']}",
                "pass": name,
                "framework, ms": f"{result[name]['own_ms']:.2f}",
                "keyed, ms": f"{result[name]['keyed_ms']:.2f}",
                "ratio": f"{result[name]['ratio']['median']:.2f}",
                "quartiles": f"{result[name]['ratio']['low']:.2f} to {result[name]['ratio']['high']:.2f}",
            }
            for result in self.backends
            for name in PASSES
        ]
        title = f"Dropout of {'x'.join(map(str, SHAPE))} values, p = {P}"
        numbers = ("framework, ms", "keyed, ms", "ratio", "quartiles")
        common.console().print(common.table(title, rows, numbers))


def run(
    backend: str | None = None, device: str | None = None, rounds: int = 15, notify: common.Notify = common.ignore
) -> DropoutReport:
    """Times both dropouts on each installed backend, or on the given one.

    Args:
        backend: The only backend to measure.
        device: The device; `auto` if absent.
        rounds: Number of repetitions.
        notify: Receives a line of progress per backend.
    """
    results = []
    for name in common.installed_backends(backend):
        notify(f"{name}: {rounds} rounds")
        task = {"backend": name, "device": device or "auto", "rounds": rounds, "shape": SHAPE}
        results.append(common.measure_isolated("dropout", task))
    return DropoutReport(results)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Returns the times of one backend. Runs in a separate process."""
    tools = backends.module(task["backend"], "tools.bench")
    shape = tuple(task["shape"])
    keys = rng.fold(rng.key(0, "dropout", 0)[None, :], np.arange(shape[0], dtype=np.uint64))
    pair = tools.DropoutPair(shape, P, keys, task["device"])
    result: dict[str, Any] = common.machine(task["backend"], pair.device)
    for name, backward in PASSES.items():
        layers = {"own": lambda b=backward: pair.native(b), "keyed": lambda b=backward: pair.keyed(b)}
        times = common.time_interleaved(layers, task["rounds"], pair.synchronize)
        result[name] = {
            **{f"{layer}_ms": 1e3 * statistics.median(values) for layer, values in times.items()},
            "ratio": common.ratio(times["keyed"], times["own"]),
        }
    return result
