"""Cores and threads of the host, and the number of threads of small products."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Environment variables with which users set the number of threads."""


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def for_ranges(work: Callable[[int, int], None], n: int, smallest: int, most: int) -> None:
    """Divides range(n) among the usable cores and calls `work(start, stop)` for each part.

    Threads are faster only where `work` releases Python's lock for most of the time, as numpy's functions do for
    large arrays. They wait for each other between two such functions, the longer the more threads there are.

    Args:
        work: Works on one part; independent of the others.
        n: End of the range.
        smallest: The smallest part for which a thread is started.
        most: The largest number of threads.
    """
    threads = max(1, min(usable_cores(), n // smallest, most))
    bounds = [n * part // threads for part in range(threads + 1)]
    if threads == 1:
        work(0, n)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, bounds[:-1], bounds[1:]):
            pass


def fastest(work: Callable[[], object], set_threads: Callable[[int], None], threads: int) -> int:
    """Returns 1 or `threads`: the number of threads with which `work` is faster. It stays set.

    Threads wait for each other at the end of each product. If other processes use the cores, a wait may take as long
    as the scheduler leaves a thread without a core: a thousand times the duration of a small product. So 1 is
    preferred unless more threads are a fifth faster in total, waits included.

    Args:
        work: A product of the size in question. It runs at most 20 times with each number, or for 0.05 s.
        set_threads: Sets the number of threads.
        threads: The larger number.
    """
    set_threads(1)
    if threads == 1:
        return 1
    alone, repetitions = _time(work, 20, 0.05)
    set_threads(threads)
    together, finished = _time(work, repetitions, 0.8 * alone)
    if finished == repetitions and together < 0.8 * alone:
        return threads
    set_threads(1)
    return 1


def _time(work: Callable[[], object], repetitions: int, limit: float) -> tuple[float, int]:
    """Returns the duration of up to `repetitions` calls in seconds, and their number, after a call to warm up."""
    work()
    begin, seconds, count = time.perf_counter(), 0.0, 0
    while count < repetitions and seconds <= limit:
        work()
        count += 1
        seconds = time.perf_counter() - begin
    return seconds, count
