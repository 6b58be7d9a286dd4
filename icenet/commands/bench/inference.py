"""`icenet bench decode`, `prefill`, `batch`, `load`, `convert`, `start`: IceNet, its peers, the physical limit.

Each side has its own process. In each round every side does the same work once, so that other load on the machine
affects all of them equally.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from icenet.commands import isolated
from icenet.commands.bench import common, limits, sides, target
from icenet.commands.bench.common import rounded
from icenet.commands.bench.inference_rows import ROWS, Options, Row
from icenet.commands.doctor import system_facts
from icenet.core.errors import IceNetError
from icenet.core.training.signals import Stopped

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
Party = tuple[str, str]
"""A side and a variant of its model; the first variant has no name."""
_TARGET = target.__name__


@dataclass
class Measured:
    """The measurements of one side for one case.

    Attributes:
        cold: Seconds of each part in the first call, which loads and compiles code.
        rounds: Seconds of each part in each round that counts.
        tokens: New tokens of the first prompt.
        peak: Peak of the memory in bytes; None if it is unknown.
        agreement: Part of the compared proposals of a draft that were accepted; None without a draft.
    """

    cold: list[float]
    rounds: list[list[float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak: int | None = None
    agreement: float | None = None

    def seconds(self, row: Row) -> list[float]:
        """Returns the seconds of the work that counts, by round: without the shortest call for the first token."""
        if row.work is None or len(self.rounds[0]) == 1:
            return [parts[0] for parts in self.rounds]
        first = min(parts[0] for parts in self.rounds)  # other load only adds, so the difference is not too small
        return [parts[1] - first if parts[1] > first else parts[1] for parts in self.rounds]

    def first_token(self) -> float:
        """Returns the median of the seconds of a call that generates one token."""
        return statistics.median(parts[0] for parts in self.rounds)

    def floor(self) -> float:
        """Returns the median of the seconds of the second part."""
        return statistics.median(parts[1] for parts in self.rounds)

    def cold_first_token(self, row: Row) -> float:
        """Returns the seconds of the first token in a new process, with everything that only first calls do."""
        if row.work is None or len(self.cold) == 1:
            return self.cold[0]
        return self.cold[0] + max(self.cold[1] - self.floor(), 0.0)


@dataclass(frozen=True, kw_only=True)
class InferenceReport(common.SidesReport):
    """The results. `rates` has bytes and operations per second.

    Attributes:
        target: What was measured, with the changes of its configuration.
        parameters: Number of its parameters.
    """

    target: str
    parameters: int

    def as_dict(self) -> dict[str, Any]:
        return {"target": self.target, "parameters": self.parameters, **super().as_dict()}

    def cells(self, result: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, str]:
        decodes = result["row"] in ("decode", "quantized", "speculative")
        uses_model, has_draft = result["row"] in sides.USES_MODEL, result["row"] == "speculative"
        return {
            "side": entry["side"],
            result["unit"]: rounded(entry["value"]),
            "quartiles": f"{rounded(entry['low'])} to {rounded(entry['high'])}",
            **{f"{name} / this": f"{ratio['median']:.2f}" for name, ratio in entry["ratios"].items()},
            **({f"this / {result['first']}": f"{entry['speedup']['median']:.2f}"} if result["first"] else {}),
            "of the limit": f"{100 * entry['of_limit']:.1f}%",
            **({"first token, ms": rounded(1e3 * entry["first_token_s"])} if decodes else {}),
            **({"cold, s": f"{entry['cold_first_token_s']:.2f}"} if uses_model else {}),
            **({"peak, MB": _megabytes(entry["peak_bytes"])} if uses_model and not result["first"] else {}),
            **({"agreement": f"{entry['agreement']:.0%}" if "agreement" in entry else ""} if has_draft else {}),
        }

    def limit(self, result: Mapping[str, Any]) -> str:
        limit = result["limit"]
        value = f"{rounded(limit['value'])} {result['unit']}"
        if limit["by"] not in ("memory", "compute"):
            sides = result["sides"]
            if result["row"] == "start" and len(sides) > 1:  # that of each framework
                floors = [(entry["of_limit"] * statistics.median(entry["seconds"]), entry["side"]) for entry in sides]
                value = ", ".join(f"{rounded(seconds)} {result['unit']} ({side})" for seconds, side in floors)
            size = f"; {limit['nbytes'] / 1e6:,.0f} MB" if limit["nbytes"] else ""
            return f"limit {value}: {limit['by']}{size}"
        by_memory = limit["by"] == "memory"
        work = f"{limit['nbytes'] / 1e9:.3g} GB" if by_memory else f"{limit['operations'] / 1e12:.3g} TFLOP"
        return f"limit {value}, by {limit['by']}: {work} at the measured rate"

    def summary(self) -> str:
        measured = "; ".join(
            f"{dtype}: {rounded(rate['bytes'] / 1e9)} GB/s, {rounded(rate['operations'] / 1e12)} TFLOP/s"
            for dtype, rate in self.rates.items()
        )
        rates = f" Measured rates of the machine: {measured}." if measured else ""
        return f"{self.target}, {self.parameters:,} parameters.{rates}"


def _megabytes(nbytes: int | None) -> str:
    return "" if nbytes is None else rounded(nbytes / 1e6)


def run(rows: Sequence[str], options: Options, notify: common.Notify = common.ignore) -> InferenceReport:
    """Measures rows. A side that fails is left out with a note. Ctrl-C and signals end the run with the rounds done.

    Args:
        rows: Names in `ROWS`.
        options: What is measured.
        notify: Receives a line of progress.

    Raises:
        IceNetError: The model cannot be measured, or no side can run.
    """
    return _Run(rows, options, notify).run()


class _Run:
    """A run: the processes of the sides, and what they measured."""

    def __init__(self, rows: Sequence[str], options: Options, notify: common.Notify) -> None:
        self._rows, self._options, self._notify = rows, options, notify
        self._sides = common.Sides(sides.Session, options.device, notify)
        self._rates: dict[str, dict[str, float]] = {}
        self._done: list[tuple[str, dict[str, Any], str, dict[Party, Measured]]] = []
        self._model: dict[str, Any] = {}

    def run(self) -> InferenceReport:
        target.check(self._options.target, self._options.overrides)
        interruption: BaseException | None = None
        with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="icenet-bench-") as work:
            stack.callback(self._sides.close)
            try:
                self._choose_sides()
                self._measure(work)
            except (KeyboardInterrupt, Stopped) as error:
                if not any(side.rounds for *_, measured in self._done for side in measured.values()):
                    raise
                interruption = error
        return InferenceReport(
            target=" ".join([self._options.target, *self._options.overrides]),
            parameters=self._model["size"]["parameters"],
            machine={**system_facts(), "sides": self._sides.facts},
            rates=self._rates,
            results=[result for done in self._done for result in self._summarize(*done)],
            notes=self._sides.notes,
            interruption=interruption,
        )

    def _choose_sides(self) -> None:
        """Starts the sides that are chosen and installed."""
        able = {name: kind.backend for name, kind in sides.KINDS.items() if set(self._rows) & set(kind.rows)}
        chosen = common.chosen_sides(able, self._options.only, self._options.backend)
        self._sides.open({name: sides.reason_missing(name) for name in chosen})
        if not any(sides.KINDS[name].package is None for name in self._sides.names):
            notes = "; ".join(self._sides.notes) or "--side has none, and the peers are measured next to one"
            raise IceNetError(f"bench: no side of IceNet runs here: {notes}")

    def _measure(self, work: str) -> None:
        options = self._options.for_device(self._sides.device)
        cases = {row: ROWS[row].cases(options) for row in self._rows}
        tokens = max(
            max(case["lengths"], default=0) + case["new_tokens"] for found in cases.values() for case in found
        )
        self._notify(f"{options.target}: the weights are prepared")
        dtypes = options.dtypes or ()
        bits = list(options.bits) if "quantized" in self._rows else []
        arguments = (options.target, list(options.overrides), tokens + 1, dtypes[0], work, bits, options.group_size)
        self._model = prepare(*arguments)
        if self._model["problem"]:
            peers = [name for name in self._sides.names if sides.KINDS[name].package]
            self._sides.leave_out(peers, self._model["problem"])
        for dtype in dtypes:
            self._measure_rates(dtype)
            for row in self._rows:
                for case in cases[row]:
                    self._measure_case(row, {**case, "dtype": dtype}, options)
            self._measure_rates(dtype)  # again: other load lowers them

    def _measure_rates(self, dtype: str) -> None:
        """Measures the rates of the machine: the best of all sides. On a CPU, fp32 replaces slower dtypes."""
        if all(ROWS[row].work is None for row in self._rows):
            return
        best = self._rates.get(dtype, {"bytes": 0.0, "operations": 0.0})
        for name in self._sides.names:
            if sides.KINDS[name].package is not None:
                continue  # its framework is that of a side of IceNet
            self._notify(f"{name}: rates of the machine, {dtype}")
            on_cpu = self._sides.facts[name]["device"] == "cpu"
            for kind in dict.fromkeys((dtype, "fp32") if on_cpu else (dtype,)):
                if (found := self._sides.call(name, "rates", kind)) is not None:
                    best = {key: max(best[key], found[key]) for key in best}
        self._rates[dtype] = best

    def _measure_case(self, row: str, case: dict[str, Any], options: Options) -> None:
        title = _title(row, case)
        case = {**case, "vocab_size": self._model["size"]["vocab_size"]}
        measured: dict[Party, Measured] = {}
        self._done.append((row, case, title, measured))  # also the rounds before Ctrl-C count
        self._rounds(row, case, options, title, measured)

    def _rounds(
        self, row: str, case: dict[str, Any], options: Options, title: str, measured: dict[Party, Measured]
    ) -> None:
        """Lets the sides do the work in turn. Two rounds that do not count load and compile code."""
        names = [name for name in self._sides.names if row in sides.KINDS[name].rows]
        names = names[:1] if case.get("once") else names
        variants = ROWS[row].variants(options)
        parties = [(name, variant) for name in names for variant in variants]

        def attempt(party: Party, method: str, *arguments: Any) -> Any:
            """A failure ends all variants of a side: they were in its process."""
            found = self._sides.call(party[0], method, *arguments, *([party[1]] if party[1] else []), part=row)
            if found is None:
                for other in [other for other in parties if other[0] == party[0]]:
                    parties.remove(other)
                    measured.pop(other, None)
            return found

        for party in list(parties):
            if party in parties:
                attempt(party, "load", row, self._folder(row, *party), case["dtype"], options.sample)
        for number in range(-2, options.repeats):
            if number != -1:
                self._notify(f"{title}: {'warm-up' if number < 0 else f'round {number + 1} of {options.repeats}'}")
            for party in list(parties):
                found = attempt(party, "measure", row, case) if party in parties else None
                if found is None:
                    continue
                if number == -2:
                    measured[party] = Measured(found["seconds"], tokens=found["tokens"])
                elif number >= 0:
                    measured[party].rounds.append(found["seconds"])
                    measured[party].agreement = found.get("agreement")
        if row in sides.USES_MODEL and len(variants) == 1:  # otherwise several models are in the memory of a process
            for party in parties:
                measured[party].peak = self._sides.call(party[0], "peak")

    def _folder(self, row: str, name: str, variant: str) -> str:
        """Returns the folder that a side loads."""
        if row == "quantized" and variant:
            return str(self._model["quantized"][variant.split()[0]])
        return str(self._model["peers" if sides.KINDS[name].package else "own"])

    def _summarize(
        self, row: str, case: dict[str, Any], title: str, measured: dict[Party, Measured]
    ) -> list[dict[str, Any]]:
        """Returns the entry of a case; none if no side finished a round."""
        kind = ROWS[row]
        done = min((len(side.rounds) for side in measured.values() if side.rounds), default=0)
        complete = {party: side for party, side in measured.items() if side.rounds}
        if not done:
            return []
        for side in complete.values():  # after Ctrl-C, some have one more
            side.rounds = side.rounds[:done]
        tokens = kind.tokens(case) if kind.tokens else None
        least = {
            variant: self._least(row, case, variant, complete) for variant in dict.fromkeys(v for _, v in complete)
        }
        own = {party: side.seconds(kind) for party, side in complete.items() if sides.KINDS[party[0]].package is None}
        entries = []
        for (name, variant), side in complete.items():
            seconds = side.seconds(kind)
            values = sorted(tokens / one if tokens else one for one in seconds)
            low, value, high = common.quartiles(values)
            ours = complete.get((f"icenet {sides.KINDS[name].backend}", variant if sides.KINDS[name].package else ""))
            entry = {
                "side": f"{name}, {variant}" if variant else name,
                "value": value,
                "low": low,
                "high": high,
                "seconds": seconds,
                "ratios": {one: common.ratio(seconds, times) for (one, kin), times in own.items() if kin == variant},
                "of_limit": (least[variant][0] if kind.work else side.floor()) / statistics.median(seconds),
                "first_token_s": side.first_token(),
                "cold_first_token_s": side.cold_first_token(kind),
                "peak_bytes": side.peak,
                "same_tokens": _common(side.tokens, ours.tokens) if ours else None,
            }
            if kind.first:
                entry["speedup"] = common.ratio(complete[name, ""].seconds(kind), seconds)
            if side.agreement is not None:
                entry["agreement"] = side.agreement
            entries.append(entry)
        shortest, limit = least[next(iter(least))]
        limit = {"value": tokens / shortest if tokens else shortest, **limit}
        shown = {key: value for key, value in case.items() if key not in ("vocab_size", "once", "least")}
        shown["sample"] = self._options.sample
        head = {"row": row, "title": title, "case": shown, "unit": kind.unit, "limit": limit, "first": kind.first}
        return [{**head, "sides": entries}]

    def _least(
        self, row: str, case: Mapping[str, Any], variant: str, complete: Mapping[Party, Measured]
    ) -> tuple[float, dict[str, Any]]:
        """Returns the shortest possible seconds of a variant, and what they are made of."""
        work = ROWS[row].work
        if work is None:
            shortest = min(side.floor() for side in complete.values())
            nbytes = 0 if "least" in case else self._model["nbytes"]
            return shortest, {"by": case.get("least", ROWS[row].limit), "nbytes": nbytes}
        bits = int(variant.split()[0]) if row == "quantized" and variant else None
        least = work(limits.ModelSize(**self._model["size"]), {**case, "bits": bits}, BYTES[case["dtype"]])
        shortest, by = least.seconds(self._rates[case["dtype"]])
        return shortest, {"by": by, "nbytes": least.nbytes, "operations": least.operations}


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the number of equal tokens at the beginning of two texts."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _title(row: str, case: Mapping[str, Any]) -> str:
    lengths = case["lengths"] or [0]
    return ROWS[row].title.format(count=len(lengths), shortest=min(lengths), longest=max(lengths), **case)


def prepare(*arguments: Any) -> dict[str, Any]:
    """Returns what `target.prepare` returns, computed in another process.

    Raises:
        IceNetError: As there.
    """
    try:
        found: dict[str, Any] = isolated.call(_TARGET, "prepare", *arguments)
    except isolated.IsolatedError as error:
        raise IceNetError(str(error)) from None
    return found
