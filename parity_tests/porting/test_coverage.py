"""The page of what ports cover, and the processes that measure it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import coverage_page
import coverage_table
import pytest


def test_the_page_is_that_of_the_stored_results() -> None:
    assert coverage_table.PAGE.read_text(encoding="utf-8") == coverage_page.page(coverage_table.stored())


@pytest.mark.parametrize(
    ("stored", "phrase"),
    [
        (
            "failed: Norm(size=5): the port of Norm differs: gradient of input 0 in evaluation mode on 2x4x8x9, "
            "7.3e+02 times the noise of rounding the port differs: gradient of",
            "`Norm(size=5)`: gradient of input 0 in evaluation mode: 730 times the noise",
        ),
        (
            "failed: the port of Net differs: output 0 in training mode on 2x3, 1e+04 times the noise of rounding, "
            "with IceNet's layers; with those of MLX the port computes what",
            "output 0 in training mode: 10,000 times the noise, with IceNet's layers only",
        ),
        (
            "failed: AssertionError: gradient [1. 0.] instead of [1. 1.5] | [()]",
            "gradients differ: 0 instead of 1.5",
        ),
        ("failed: AssertionError: forward (9,) torch.bfloat16: [0. 1.] instead of [0. 1.] | []", "outputs differ"),
        ("failed: AssertionError: gradient [ nan 1.] instead of [0. 1.]", "gradients are NaN in the port only"),
        ("failed: sample 3 does not end in 60 s", "sample 3 does not end in 60 s"),
        (f"failed: {'word ' * 30}", f"{'word ' * 19}..."),
    ],
)
def test_a_failure_is_one_phrase(stored: str, phrase: str) -> None:
    assert coverage_page.phrase(stored) == phrase


class Worker:
    """A worker whose second sample does not end, and whose fourth ends the process."""

    made = 0

    def __init__(self, groups: Sequence[str] = ()) -> None:
        Worker.made += 1
        self.entries, self.skip = {group: ["float32 entry"] for group in groups}, 0

    def send(self, group: str, name: str, skip: int) -> None:
        self.skip = skip
        self.told = iter(self.messages())

    def messages(self) -> Any:
        for number in range(self.skip, 6):
            yield {"number": number}
            if number in (1, 3):
                yield queue.Empty if number == 1 else None
            yield {"status": "passed" if number else "missing", "detail": "" if number else "polygamma"}
        yield {"done": True}

    def next(self, limit: float) -> Any:
        message = next(self.told)
        if message is queue.Empty:
            raise queue.Empty
        return message

    def end(self) -> None:
        pass


def test_a_sample_that_hangs_or_crashes_counts_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_table, "Worker", Worker)
    run = coverage_table.Run(["ops"], 1, lambda group: 5, lambda group, names: names, 60, lambda run: None)
    result = run.results["ops"]["float32 entry"]
    assert (result["passed"], result["failed"], result["missing"], Worker.made) == (3, 2, 1, 3)
    assert [problem.partition(":")[0] for problem in result["problems"]] == ["missing", "failed", "failed"]
    assert "sample 1 does not end in 5 s" in result["problems"][1] and "sample 3 crashes" in result["problems"][2]
    entries = {name: {**item, "run": 0} for name, item in run.results["ops"].items()}
    measured = {"commit": "1234567", "day": "2026-11-30", "machine": "here"}
    page = coverage_page.page({"ops": {"of": 1, "runs": [measured], "entries": entries}})
    assert (
        "| 5 | 3 | 60.0 % |" in page
        and "| 1 | 1234567 | 2026-11-30 | here |" in page
        and "2 of 5" in page
        and "lacks: `polygamma`" in page
    )


def test_an_entry_notes_the_run_that_measured_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_table, "RESULTS", tmp_path / "coverage.json")
    names = ["a", "b"]

    def commits() -> dict[str, str]:
        group = coverage_table.stored()["layers"]
        return {name: group["runs"][item["run"]]["commit"] for name, item in group["entries"].items()}

    coverage_table.save("layers", {name: {"passed": 1} for name in names}, False, names, "first")
    coverage_table.save("layers", {"a": {"passed": 1}}, True, names, "second")
    assert commits() == {"a": "second", "b": "first"}
    coverage_table.save("layers", {"b": {"failed": 1}}, True, names, "third")
    assert commits() == {"a": "second", "b": "third"} and len(coverage_table.stored()["layers"]["runs"]) == 2


class Slow(Worker):
    """A worker whose first sample takes longer than the run."""

    def messages(self) -> Any:
        yield {"number": 0}
        yield queue.Empty

    def next(self, limit: float) -> Any:
        message = next(self.told)
        if message is queue.Empty:
            self.ended.wait(5)
            return None
        return message

    def __init__(self, groups: Sequence[str] = ()) -> None:
        super().__init__(groups)
        self.ended = threading.Event()

    def end(self) -> None:
        self.ended.set()


def test_a_budget_ends_a_run_and_what_was_under_way_has_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_table, "Worker", Slow)
    run = coverage_table.Run(["ops"], 1, lambda group: 60, lambda group, names: names, 0.1, lambda run: None)
    assert run.results == {"ops": {}} and run.chosen == {"ops": ["float32 entry"]}


def test_all_groups_advance_equally() -> None:
    order = coverage_table.interleaved({"a": ["1", "2", "3", "4"], "b": ["5", "6"]})
    assert [name for _, name in order] == ["1", "5", "2", "3", "6", "4"]
