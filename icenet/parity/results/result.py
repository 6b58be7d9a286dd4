"""The result of `icenet.parity.compare` as data: stages, rows, modules, the culprit and its cause.

`icenet.parity.results.report` shows it as text, JSON and a page. The two sides are called `a`, the module under test,
and `b`, the reference. Paths of modules are those of `b`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from icenet.parity.results.status import (
    DIFFERS,
    FAILED,
    LESS_EXACT,
    NOT_RUN,
    PASSED,
    SKIPPED,
    number,
)


@dataclass(frozen=True)
class Histogram:
    """How the values of a differing tensor are distributed, on common edges.

    Attributes:
        edges: `bins + 1` edges, ascending.
        a, b: Number of values of each side in each bin.
    """

    edges: tuple[float, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """The comparison of one tensor or number.

    Attributes:
        path: Path of the module that has it, in `b`; empty for the model itself.
        part: Which value of the module it is: `output`, `output[1]`, `input 0`, `gradient of output`,
            `gradient of weight`, `weight`, `running_mean`, `loss`, `step 2`, ...
        shape: Its shape in `b`.
        status: "passed", "differs", "contains", "inherits", "less exact" or "skipped".
        ratio: Largest error of `a` in units of the noise, over the run and the replay; 8 is allowed.
        error: RMS of the error of `a` against the float64 reference, in the run.
        noise: RMS of the error of `b` against the float64 reference, in the run.
        scale: RMS of the reference.
        own_ratio: The ratio on the inputs of the reference; None without a replay.
        own_part: The value of `own_ratio`, such as `output`, `input of mlp` or `gradient of weight`.
        where: Where in the module the difference begins, such as "between mlp and norm2"; else empty.
        note: A remark, such as unequal shapes or axes.
        call: Number of the call of the module, from 0.
        depth: Position in the order of the computation, from 0; gradients are in reverse order.
        histogram: The values of both sides, for rows that differ.
    """

    path: str
    part: str
    shape: tuple[int, ...] = ()
    status: str = PASSED
    ratio: float = 0.0
    error: float = 0.0
    noise: float = 0.0
    scale: float = 0.0
    own_ratio: float | None = None
    own_part: str = ""
    where: str = ""
    note: str = ""
    call: int = 0
    depth: int = 0
    histogram: Histogram | None = None

    @property
    def passed(self) -> bool:
        """Whether the value agrees."""
        return self.status in (PASSED, SKIPPED, LESS_EXACT)

    @property
    def name(self) -> str:
        """The path and the part, as in `blocks.2.mlp: output`."""
        call = f" (call {self.call + 1})" if self.call else ""
        return f"{self.path or '(model)'}: {self.part}{call}"


@dataclass
class Stage:
    """One stage of the comparison.

    Attributes:
        name: One of ALL_STAGES.
        status: "passed", "failed", "skipped" or "not run".
        seconds: Wall time.
        note: Why it failed or was skipped, or what was compared, in one line.
        rows: The comparisons, in the order of the computation.
    """

    name: str
    status: str = NOT_RUN
    seconds: float = 0.0
    note: str = ""
    rows: list[Row] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the stage did not fail."""
        return self.status != FAILED

    @property
    def worst(self) -> Row | None:
        """The row with the largest ratio."""
        return max(self.rows, key=lambda row: row.ratio, default=None)


@dataclass
class Module:
    """A module of the pair.

    Attributes:
        path: Path in `b`, or in `a` if `b` lacks it; empty for the model itself.
        path_a, path_b: Path on each side; None where it does not exist.
        class_a, class_b: Name of its class on each side, such as `Linear`; empty where it does not exist.
        status: "passed", "differs", "contains", "inherits", "less exact", "skipped" or "not run".
        ratio: The largest ratio of its rows.
        where: See `Row.where`.
        notes: Remarks: how it was matched, why it was not compared, ties.
        children: Paths of the modules within it, one level down.
    """

    path: str
    path_a: str | None = None
    path_b: str | None = None
    class_a: str = ""
    class_b: str = ""
    status: str = NOT_RUN
    ratio: float = 0.0
    where: str = ""
    notes: list[str] = field(default_factory=list)
    children: list[str] = field(default_factory=list)


@dataclass
class Result:
    """The result of a comparison of two modules.

    Attributes:
        dtype: Compute dtype under test: fp32, bf16 or fp16.
        names: Class names of `a` and `b`.
        stages: The stages, in order.
        modules: The modules in the order of `b`, parents first, then those that only `a` has.
        culprit: Path of the module where the first difference begins; "" for the model itself, None if all passed.
        where: Where in the culprit, such as "between mlp and norm2"; empty if it is a layer without others within.
        cause: A suggested cause in one line, such as "eps is 1e-05 in a, 1e-06 in b"; empty without one.
        notes: Remarks on how the comparison was done.
        environment: By role ("a", "b", "reference"): `framework`, `version`, `device`, `tf32`, ...
        seed: Seed of drawn inputs, cotangents and targets.
        inputs: Description of each input by name: dtype and shape, such as `float32 [2, 3, 32, 32]`.
        draws: Number of inputs that were compared, 1 for those of the user.
        other_inputs: The inputs in place of which the difference needs other values; empty without one.
        replay: Path of the file with the smallest input that differs; empty without one.
        command: A command or program that repeats the comparison; empty if it is not known.
        losses: The losses of the stage training by role, "a", "b" and "reference"; empty without it. Those of the
            reference are not computed if the noise of the first loss shows that the others agree. Those of `b` are of
            a step with the gradients of `a`, if there is one step and gradients differ within the noise.
        draws_in: The module that draws random numbers in training mode, so that this mode was not compared.
        modes_off: Paths of modules that were compared in evaluation mode, because their random numbers are not equal.
        copied_weights: Whether `a` has the weights of `b`, because its own had nothing in common with them.
    """

    dtype: str = "fp32"
    names: tuple[str, str] = ("", "")
    stages: list[Stage] = field(default_factory=list)
    modules: list[Module] = field(default_factory=list)
    culprit: str | None = None
    where: str = ""
    cause: str = ""
    notes: list[str] = field(default_factory=list)
    environment: dict[str, dict[str, str]] = field(default_factory=dict)
    seed: int = 0
    inputs: dict[str, str] = field(default_factory=dict)
    draws: int = 1
    other_inputs: str = ""
    replay: str = ""
    command: str = ""
    losses: dict[str, list[float]] = field(default_factory=dict)
    copied_weights: bool = False
    draws_in: str = ""
    modes_off: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no stage failed."""
        return all(stage.passed for stage in self.stages)

    @property
    def failed_stage(self) -> Stage | None:
        """The stage that failed."""
        return next((stage for stage in self.stages if not stage.passed), None)

    @property
    def verdict(self) -> str:
        """The first line of the report: that all agrees, or the culprit, the stage, the ratio and the cause."""
        stage = self.failed_stage
        if stage is None:
            count = sum(len(stage.rows) for stage in self.stages)
            rows = [row for s in self.stages for row in s.rows if row.status == PASSED]
            worst = max(rows, key=lambda row: row.ratio, default=None)
            largest = f", largest ratio {number(worst.ratio)} ({worst.name})" if worst and worst.ratio else ""
            mode = (
                f"the training mode was not compared: {self.draws_in} draws random numbers" if self.draws_in else ""
            )
            if self.modes_off and not mode:
                names = ", ".join(path or "the model" for path in self.modes_off)
                mode = f"the training mode of {names} itself was not compared: its random numbers are not equal"
            return "; ".join(
                filter(None, (f"passed: {count} values agree in {self.dtype}{largest}", mode, self._weights()))
            )
        row = self.culprit_row
        parts = [self._place()]
        if row is not None and math.isfinite(row.ratio) and row.ratio:
            own = row.own_ratio if row.own_ratio is not None and row.own_ratio > 8 else row.ratio
            part = row.own_part or row.part
            parts.append(f"{part} is off by {number(own)} times the noise ({stage.name}, 8 are allowed)")
        else:
            note = (row.note if row is not None else "") or stage.note
            parts.append(f"{note} ({stage.name})" if note else stage.name)
        if self.other_inputs:
            parts.append(f"with other values of {self.other_inputs}")
        if self.cause:
            parts.append(f"cause: {self.cause}")
        return "; ".join(filter(None, (*parts, self._weights())))

    def _weights(self) -> str:
        """Returns that the weights were not equal, if they were copied for that reason."""
        if not self.copied_weights:
            return ""
        return "the weights were not equal: those of b were used; icenet.from_torch copies them"

    @property
    def culprit_row(self) -> Row | None:
        """The row of the failed stage at which the difference begins."""
        stage = self.failed_stage
        if stage is None:
            return None
        rows = [row for row in stage.rows if not row.passed]
        return next(
            (row for row in rows if row.path == self.culprit and row.status == DIFFERS),
            next((row for row in rows if row.path == self.culprit), rows[0] if rows else None),
        )

    def _place(self) -> str:
        """Returns `differs in blocks.2.mlp`, `differs in blocks.2 itself, between mlp and norm2` or `in the loss`."""
        if self.culprit is None:
            return "differs"
        place = self.culprit or f"the model ({self.names[0]})"
        if self.where == "in the optimizer":
            return f"differs {self.where}, first at {place}"
        if self.where in ("in the loss", "in the training steps"):
            return f"differs {self.where}"
        return f"differs in {place} itself, {self.where}" if self.where else f"differs in {place}"

    def module(self, path: str) -> Module | None:
        """Returns the module at a path of `b`."""
        return next((module for module in self.modules if module.path == path), None)

    def rows(self) -> Iterator[tuple[Stage, Row]]:
        """Yields all rows with their stages."""
        return ((stage, row) for stage in self.stages for row in stage.rows)
