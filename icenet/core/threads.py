"""Cores and threads of the host."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def for_ranges(work: Callable[[int, int], None], n: int, smallest: int) -> None:
    """Divides range(n) among the usable cores and calls `work(start, stop)` for each part.

    Threads are faster only where `work` releases Python's lock, as numpy's functions do for large arrays.

    Args:
        work: Works on one part; independent of the others.
        n: End of the range.
        smallest: The smallest part for which a thread is started.
    """
    threads = max(1, min(usable_cores(), n // smallest))
    bounds = [n * part // threads for part in range(threads + 1)]
    if threads == 1:
        work(0, n)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, bounds[:-1], bounds[1:]):
            pass
