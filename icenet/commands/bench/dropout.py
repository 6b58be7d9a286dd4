"""`icenet bench dropout`: keyed dropout, whose masks agree on both backends, against each framework's own."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from icenet.commands.bench import process
from icenet.core import backends, rng

SHAPE = (32, 512, 512)
P = 0.1


@dataclass(frozen=True)
class DropoutReport:
    """The figures of each backend."""

    backends: list[dict[str, Any]]

    def as_dict(self) -> list[dict[str, Any]]:
        return self.backends

    def render(self) -> None:
        lines = [
            {
                "backend": f"{found['backend']} {found['device']}",
                "what": what,
                "its own, ms": f"{found[what]['own_ms']:.2f}",
                "keyed, ms": f"{found[what]['keyed_ms']:.2f}",
                "ratio": f"{found[what]['ratio']['median']:.2f}",
                "quartiles": f"{found[what]['ratio']['low']:.2f} to {found[what]['ratio']['high']:.2f}",
            }
            for found in self.backends
            for what in ("forward", "forward and backward")
        ]
        numbers = ("its own, ms", "keyed, ms", "ratio", "quartiles")
        title = f"Dropout of {'x'.join(map(str, SHAPE))} values, p = {P}"
        process.console().print(process.table(title, lines, numbers))


def run(
    backend: str | None = None,
    device: str | None = None,
    rounds: int = 15,
    notify: Callable[[str], None] = lambda text: None,
) -> DropoutReport:
    """Measures on the backends that are here, each in a process of its own."""
    found = []
    for name in process.backends_here(backend):
        notify(f"{name}: {rounds} rounds")
        task = {"backend": name, "device": device or "auto", "rounds": rounds, "shape": SHAPE}
        found.append(process.measure_apart("dropout", task))
    return DropoutReport(found)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: milliseconds of each, and ratios round by round."""
    room = backends.module(task["backend"], "tools.bench")
    shape = tuple(task["shape"])
    keys = rng.fold(rng.key(0, "dropout", 0)[None, :], np.arange(shape[0], dtype=np.uint64))
    pair = room.DropoutPair(shape, P, keys, task["device"])
    report: dict[str, Any] = process.machine(task["backend"], pair.device)
    for what, backward in (("forward", False), ("forward and backward", True)):
        ways = {"own": lambda b=backward: pair.own(b), "keyed": lambda b=backward: pair.keyed(b)}
        times = process.interleaved(ways, task["rounds"], pair.synchronize)
        report[what] = {
            **{f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()},
            "ratio": process.ratio(times["keyed"], times["own"]),
        }
    return report
