"""What all sides of a measurement have, whether they generate or train."""

from __future__ import annotations

import statistics
import time
from typing import Any

from icenet.core import backends
from icenet.core.runs.run_folder import versions


class SessionBase:
    """One side, in a process of its own (see `icenet.commands.isolated`). Arguments and results are JSON types.

    Args:
        backend: The backend whose framework the side runs on.
        device: auto, cpu, gpu, ...
    """

    def __init__(self, backend: str, device: str) -> None:
        backends.resolve(backend)
        self._backend = backend
        self._tools = backends.module(backend, "tools.bench")
        self._device_name = device
        self._device = backends.module(backend, "engine.build").choose_device(device)
        self._memory = self._tools.PeakMemory(self._device)

    @property
    def device(self) -> str:
        """The kind of the device: cpu, or gpu for any other."""
        return "cpu" if "cpu" in str(self._device).lower() else "gpu"

    def facts(self) -> dict[str, Any]:
        """Returns the kind of the device, the version of the framework and the source of the memory's peak."""
        framework = f"{self._backend} {versions().get(self._backend)}"
        return {"device": self.device, "framework": framework, "memory_source": self._memory.source}


def fastest(cases: Any, enough: float = 0.02) -> float:
    """Returns the highest rate: work per second, in the unit of the cases.

    Args:
        cases: Pairs of the work of one repetition and a function that does a number of repetitions. They grow, and
            the last one is the first that takes `enough` seconds for one repetition.
        enough: Seconds.
    """
    best = 0.0
    for work, run in cases:
        run(1)
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            run(4)
            times.append((time.perf_counter() - begin) / 4)
        best = max(best, work / min(times))
        if statistics.median(times) > enough:
            break
    return best
