"""`icenet bench train`: training steps of IceNet next to loops that are written by hand, and `icenet bench guide`.

Each side has its own process. In each round every side trains for about a second, so that other load on the machine
affects all of them equally.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from icenet.commands.bench import common, loops
from icenet.commands.bench.common import rounded
from icenet.commands.bench.training_rows import Options, Row, config_of, length_of, operations
from icenet.commands.doctor import system_facts
from icenet.core import backends
from icenet.core.config import Config
from icenet.core.errors import IceNetError, UsageError
from icenet.core.host.threads import usable_cores
from icenet.core.training.signals import Stopped

MAX_STEPS = 50
"""Steps of a side in a round, at most."""
QUIET_SECONDS = 5.0
"""A side that takes longer in a round has a line of progress of its own."""


@dataclass
class Measured:
    """The measurements of one side.

    Attributes:
        cold: Seconds of the first step.
        first: The measurement of steps before the rounds.
        steps: Number of steps of a round.
        rounds: Seconds of a step in each round.
        processor: Seconds of processor time of a step in each round, of all threads.
        peak: Peak of the memory in bytes.
        data_wait: Share of its steps in which IceNet waits for data.
    """

    cold: float
    first: Mapping[str, Any]
    steps: int = 1
    rounds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    peak: int | None = None
    data_wait: float | None = None

    @property
    def step_s(self) -> float:
        """Seconds of a step before the rounds."""
        return float(self.first["seconds"])

    @property
    def round_s(self) -> float:
        """Seconds that a round is expected to take."""
        return self.steps * self.step_s

    def add(self, found: Mapping[str, Any]) -> None:
        """Adds a measurement of a session as a round."""
        self.rounds.append(found["seconds"])
        self.processor.append(found["processor_s"])
        self.peak = found["peak_bytes"]


@dataclass(frozen=True)
class TrainingReport(common.SidesReport):
    """The results. `rates` has the operations per second of the products of matrices, by precision."""

    def cells(self, result: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, str]:
        return {
            "side": entry["side"],
            result["unit"]: rounded(entry["value"]),
            "quartiles": f"{rounded(entry['low'])} to {rounded(entry['high'])}",
            "step, ms": f"{1e3 * statistics.median(entry['seconds']):.4g}",
            **{f"{name} / this": f"{ratio['median']:.2f}" for name, ratio in entry["speeds"].items()},
            **({"/ the guide": rounded(entry["of_reference"])} if result["reference"] else {}),
            "of the limit": f"{100 * entry['of_limit']:.1f}%",
            "data wait": "" if entry["data_wait"] is None else f"{100 * entry['data_wait']:.2f}%",
            "first step, s": f"{entry['cold_s']:.2f}",
            "peak, MB": "" if entry["peak_bytes"] is None else f"{entry['peak_bytes'] / 1e6:,.0f}",
        }

    def limit(self, result: Mapping[str, Any]) -> str:
        work = f"{result['operations'] / 1e12:.3g} TFLOP of products in a step at the measured rate"
        guide = f"; the guide: {result['reference']}" if result["reference"] else ""
        return f"limit {rounded(result['limit'])} {result['unit']}: {work}{guide}"

    def summary(self) -> str:
        measured = "; ".join(f"{name}: {rate / 1e12:.3g} TFLOP/s" for name, rate in self.rates.items())
        return (
            "Each side trains on random batches of the host, in turn; values are medians. Ratios are times of the "
            "side by those of IceNet in the same round: above 1, IceNet is faster. "
            f"Measured rate of the machine: {measured}."
        )


_FASTER = "--batch and --length make steps shorter, --side leaves sides out"


def _duration(seconds: float) -> str:
    """Returns an expected time as text."""
    return f"about {math.ceil(seconds)} s" if seconds < 180 else f"about {seconds / 60:.0f} minutes"


def run(rows: Mapping[str, Row], options: Options, notify: common.Notify = common.ignore) -> TrainingReport:
    """Measures rows. A side that fails is left out with a note. Ctrl-C and signals end the run with the rounds done.

    Args:
        rows: The rows by name.
        options: What is measured.
        notify: Receives a line of progress.

    Raises:
        IceNetError: A configuration is wrong, or no side can run.
    """
    if options.precision == "fp16":
        raise UsageError("--precision: fp32 or bf16; the loops that are compared have no loss scale")
    for row in rows.values():
        config_of(row, options, "cpu")  # before the processes start
    return _Run(rows, options, notify).run()


class _Run:
    """A run: the processes of the sides, and what they measured."""

    def __init__(self, rows: Mapping[str, Row], options: Options, notify: common.Notify) -> None:
        self._rows, self._options, self._notify = rows, options, notify
        self._sides = common.Sides(loops.Session, options.device, notify)
        self._rates: dict[str, float] = {}
        self._done: list[tuple[str, Config, dict[str, Measured]]] = []
        self._conditions: list[str] = []  # notes on the machine, which are no reasons of failures

    def run(self) -> TrainingReport:
        interruption: BaseException | None = None
        self._note_load()
        try:
            self._choose_sides()
            for number, name in enumerate(self._rows):
                place = f" (row {number + 1} of {len(self._rows)})" if len(self._rows) > 1 else ""
                self._measure(name, name + place)
        except (KeyboardInterrupt, Stopped) as error:
            self._use_first_steps()
            if not any(side.rounds for *_, sides in self._done for side in sides.values()):
                raise
            interruption = error
        finally:
            self._sides.close()
        results = [self._summarize(*done) for done in self._done if any(side.rounds for side in done[2].values())]
        if not results and interruption is None:
            raise IceNetError(f"bench: nothing could be measured: {'; '.join(self._sides.notes)}")
        machine = {**system_facts(), "sides": self._sides.facts}
        notes = [*self._conditions, *self._sides.notes]
        return TrainingReport(machine, self._rates, results, notes, interruption)

    def _use_first_steps(self) -> None:
        """Takes the first steps of a row for a round, if it was stopped before all sides had one."""
        for row, _, sides in self._done:
            if not all(side.rounds for side in sides.values()):
                self._sides.notes.append(
                    f"{row}: stopped before the end of a round: the figures are those of the first steps"
                )
                for side in sides.values():
                    side.rounds, side.processor = [], []
                    side.add(side.first)

    def _note_load(self) -> None:
        """Notes if other processes use the cores: threads of products then wait for each other."""
        load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, usable_cores()
        if load > 1.5 * cores:
            note = f"other processes use the machine (load {load:.1f}, {cores} cores), so times are longer and vary"
            hint = "; OMP_NUM_THREADS=1 is often faster then" if not os.environ.get("OMP_NUM_THREADS") else ""
            self._conditions.append(note + hint)
            self._notify(note + hint)

    def _choose_sides(self) -> None:
        """Starts the sides that are chosen and installed."""
        of_backend = {name: kind.backend for name, kind in loops.KINDS.items()}
        chosen = common.chosen_sides(of_backend, self._options.only, self._options.backend)
        self._sides.open(
            {
                name: "" if backends.installed(of_backend[name]) else f"{of_backend[name]} is not installed"
                for name in chosen
            }
        )
        if not self._sides.names:
            raise IceNetError(f"bench: no side runs here: {'; '.join(self._sides.notes)}")

    def _measure(self, row: str, title: str) -> None:
        config = config_of(self._rows[row], self._options, self._sides.device)
        task = common.json_config(config)
        self._measure_rate(row, config.training.mixed_precision)
        sides: dict[str, Measured] = {}
        self._done.append((row, config, sides))
        self._prepare(row, title, task, sides)
        rounds, begin = self._number_of_rounds(row, sides), time.perf_counter()
        for number in range(rounds):
            passed = time.perf_counter() - begin
            if number and passed * (number + 1) / number > 1.5 * self._options.limit:  # slower than expected
                self._note(f"{row}: {number} of {rounds} rounds, because they took {passed:.0f} s: {_FASTER}")
                rounds = number
                break
            self._measure_round(row, f"{title}: round {number + 1} of {rounds}", sides, rounds - number - 1)
        for name, side in sides.items():
            if not loops.KINDS[name].is_peer:
                steps = max(side.steps, 3) if rounds == self._options.repeats else 1
                self._notify(f"{title}: {name}: wait for data, {_duration((steps + 1) * side.step_s)}")
                side.data_wait = self._call(name, "data_wait", steps, row=row)
            self._sides.call(name, "free", part=row)  # the memory

    def _call(self, name: str, method: str, *arguments: Any, row: str) -> Any:
        """Returns the result of a method that trains steps; None, with a note, if it fails or takes too long."""
        advice = f"{_FASTER}, a longer --limit waits, and --row leaves rows out"
        timeout = 3 * self._options.limit
        found = self._sides.call(name, method, *arguments, part=row, timeout=timeout, advice=advice)
        if found is None:
            self._notify(self._sides.notes[-1])
        return found

    def _note(self, text: str) -> None:
        self._sides.notes.append(text)
        self._notify(text)

    def _prepare(self, row: str, title: str, task: Mapping[str, Any], sides: dict[str, Measured]) -> None:
        """Makes the models of a row. Adds the sides that make their first steps in time.

        Compiled ones come first, those of IceNet before the others: a run that is stopped has their first steps.
        """
        kinds = loops.KINDS
        for name in sorted(self._sides.names, key=lambda name: (not kinds[name].compiled, kinds[name].is_peer)):
            first = f"{title}: {name}: first step" + (", which compiles" if loops.KINDS[name].compiled else "")
            self._notify(first)
            with common.waiting(self._notify, first):
                cold = self._call(name, "prepare", task, row=row)
                found = None if cold is None else self._warm_up(name, row)
            if found is None:
                continue
            seconds = found["seconds"]
            steps = int(self._options.seconds / max(seconds, 1e-9))
            sides[name] = Measured(cold, found, min(max(steps, 1), MAX_STEPS))
            self._notify(f"{title}: {name}: {rounded(cold)} s, then {rounded(1e3 * seconds)} ms a step")
        prepared = dict(sides)
        sides.clear()
        sides.update((name, prepared[name]) for name in self._sides.names if name in prepared)

    def _warm_up(self, name: str, row: str) -> Any:
        """Returns the measurement of steps after the first one; None, with a note, if they fail."""
        if self._sides.device == "cpu":
            return self._call(name, "measure", 1, row=row)
        captured = self._call(name, "measure", 3, row=row)  # a CUDA graph is captured in the third step
        return captured and self._call(name, "measure", 3, row=row)

    def _measure_round(self, row: str, title: str, sides: dict[str, Measured], rounds_after: int) -> None:
        """Measures each side once. Removes those that fail."""
        after = rounds_after * sum(side.round_s for side in sides.values())
        for place, (name, side) in enumerate(list(sides.items())):
            if place == 0 or side.round_s > QUIET_SECONDS:
                left = after + sum(other.round_s for other in list(sides.values())[place:])
                self._notify(f"{title}, {name}; {_duration(left)} left")
            found = self._call(name, "measure", side.steps, row=row)
            if found is None:
                del sides[name]
                continue
            side.add(found)

    def _number_of_rounds(self, row: str, sides: Mapping[str, Measured]) -> int:
        """Returns the number of rounds, and notes if the time is enough for some of them only."""
        one = sum(side.round_s for side in sides.values())
        rounds = max(min(self._options.repeats, int(self._options.limit / max(one, 1e-9))), 1)
        if sides and rounds < self._options.repeats:
            self._note(
                f"{row}: {rounds} of {self._options.repeats} rounds, because one takes {_duration(one)}: {_FASTER}, "
                f"and --limit {math.ceil(1.2 * one * self._options.repeats)} allows all rounds"
            )
        return rounds

    def _measure_rate(self, row: str, precision: str) -> None:
        """Measures the rate of the machine, the best of all sides; on a CPU, fp32 replaces slower dtypes."""
        if precision in self._rates:
            return
        on_cpu = self._sides.device == "cpu"
        one_of_each = {loops.KINDS[name].backend: name for name in reversed(self._sides.names)}
        for name in one_of_each.values():
            self._notify(f"{name}: rate of the machine, {precision}")
            rate = self._sides.call(name, "rate", "fp32" if on_cpu else precision, part=row)
            self._rates[precision] = max(self._rates.get(precision, 0.0), rate or 0.0)

    def _summarize(self, row: str, config: Config, sides: Mapping[str, Measured]) -> dict[str, Any]:
        kind, training = self._rows[row], config.training
        is_images = config.model.input_kind == "images"
        length = length_of(config)
        items = training.batch_size * (1 if is_images else length)
        done = min(len(side.rounds) for side in sides.values() if side.rounds)
        complete = {name: side.rounds[:done] for name, side in sides.items() if side.rounds}  # after Ctrl-C
        work = operations(config)
        limit = items * self._rates.get(training.mixed_precision, 0.0) / work
        reference = float(kind.reference.split()[0]) if kind.reference else None
        entries = []
        for name, seconds in complete.items():
            low, value, high = common.quartiles([items / one for one in seconds])
            own = {ours: times for ours, times in complete.items() if not loops.KINDS[ours].is_peer}
            entries.append(
                {
                    "side": name,
                    "value": value,
                    "low": low,
                    "high": high,
                    "seconds": seconds,
                    "processor_s": sides[name].processor[:done],
                    "speeds": {ours: common.ratio(seconds, times) for ours, times in own.items()},
                    "of_limit": value / limit if limit else 0.0,
                    "of_reference": value / reference if reference else None,
                    "cold_s": sides[name].cold,
                    "peak_bytes": sides[name].peak,
                    "data_wait": sides[name].data_wait,
                }
            )
        size = f"{training.batch_size} x {length}" + (f" x {length}" if is_images else " tokens")
        return {
            "row": row,
            "title": f"Training {kind.title}, {size}, {training.mixed_precision}",
            "unit": "img/s" if is_images else "tok/s",
            "operations": work,
            "limit": limit,
            "reference": kind.reference,
            "sides": entries,
        }
