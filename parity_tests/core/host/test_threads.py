"""The number of threads: parts of a range, and the choice between one thread and all."""

from __future__ import annotations

import time

import pytest
import torch
from helpers import both_backends

from icenet.core import backends
from icenet.core.host import blas, threads


@pytest.mark.parametrize(
    ("n", "cores", "parts"), [(10, 1, 1), (10, 3, 3), (5, 3, 2), (1, 3, 1), (0, 3, 1), (99, 9, 4)]
)
def test_parts_of_a_range(monkeypatch: pytest.MonkeyPatch, n: int, cores: int, parts: int) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    found: list[range] = []
    threads.for_ranges(lambda start, stop: found.append(range(start, stop)), n, smallest=2, most=4)
    assert sorted(index for part in found for index in part) == list(range(n)) and len(found) == parts


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    with pytest.raises(ZeroDivisionError):
        threads.for_ranges(lambda start, stop: 1 // start, 8, smallest=1, most=2)


@pytest.mark.parametrize(
    ("together", "chosen"),
    [(0.002, 4), (0.0195, 1), (0.1, 1)],  # ten times as fast; hardly faster; slower, as on busy cores
)
def test_more_threads_are_chosen_where_they_are_faster(together: float, chosen: int) -> None:
    used = [1]
    duration = {1: 0.02, 4: together}
    work = lambda: time.sleep(duration[used[-1]])  # noqa: E731
    assert threads.fastest(work, used.append, 4) == chosen == used[-1]


@both_backends
def test_the_number_of_threads_can_be_set(backend: str) -> None:
    tools = backends.module(backend, "tools.threads")
    torch.set_num_threads(torch.get_num_threads())  # a number of this thread, which that of MLX does not have
    before = tools.num_threads()
    if before is None:
        pytest.skip(f"BLAS {blas.status().name} has no number of threads")
    try:
        tools.set_num_threads(2)
        assert tools.num_threads() == 2
        assert tools.choose_num_threads(1, 8) in (1, 2)
        tools.set_num_threads(1)
        assert tools.num_threads() == tools.choose_num_threads(1, 8) == 1
    finally:
        tools.set_num_threads(before)
