"""The parity report: header, tables and a verdict of one line, as text or as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from icenet.core.messages import some
from icenet.parity.configuration.locate import DIFFERS, PROPAGATED, Row
from icenet.parity.curves import CurveJudgement
from icenet.parity.yardstick import FACTOR

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WORST_SHOWN = 3


@dataclass
class Section:
    """One comparison, such as the layers in evaluation mode or the gradients."""

    title: str
    rows: list[Row]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    @property
    def worst(self) -> Row | None:
        return max(self.rows, key=lambda row: row.ratio, default=None)


@dataclass
class Report:
    """The result of a parity run.

    Attributes:
        dtype: Compute dtype under test: fp32, bf16 or fp16.
        engines: `framework`, `version`, `device` and `tf32` of "MLX", "PyTorch" and "reference".
        num_weights: Number of parameters and statistics compared bit for bit.
        unequal_weights: Names of those that differ.
        rounded_weights: Names of those that differ, but by no more than the rounding of a formula.
        shared: The owner's path of each further path of an array that the model shares.
        differences: Descriptions of what differs between the two models before any value is computed, such as the
            rate of a dropout layer.
        notes: Remarks on how the comparison was done.
        sections: The comparisons.
        curve: Comparison of the training curves; None without training.
        losses: The three training curves; empty without training.
    """

    dtype: str
    engines: dict[str, dict[str, str]]
    num_weights: int = 0
    unequal_weights: list[str] = field(default_factory=list)
    rounded_weights: list[str] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    curve: CurveJudgement | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        curve = self.curve is None or self.curve.passed
        equal = not self.unequal_weights and not self.differences
        return equal and curve and all(section.passed for section in self.sections)

    @property
    def worst(self) -> tuple[Section, Row] | None:
        """The row with the largest ratio, and its section."""
        rows = [(section, row) for section in self.sections for row in section.rows]
        return max(rows, key=lambda pair: pair[1].ratio, default=None)

    def differing(self) -> list[str]:
        """Returns the layers marked "differs here", in the order of the run."""
        return list(dict.fromkeys(_name(row) for _, row in self._origins()))

    def ties(self) -> list[str]:
        """Returns a remark on each layer whose gradients agree except at ties of its inputs."""
        rows = [row for section in self.sections for row in section.rows if row.ties]
        return list(dict.fromkeys(f"{_name(row)}: {row.ties}" for row in rows))

    def _origins(self) -> list[tuple[Section, Row]]:
        return [
            (section, row)
            for section in self.sections
            for row in section.rows
            if row.kind == "module" and row.mark == DIFFERS
        ]

    def verdict(self) -> str:
        """Returns one line: agreement with the largest ratio, or the first difference with its ratio."""
        return self._agreement() if self.passed else self._difference()

    def _agreement(self) -> str:
        count = sum(len(section.rows) for section in self.sections)
        parts = [f"MLX agrees with PyTorch in {self.dtype}: {count} values within {FACTOR:g} times the noise"]
        if self.worst is not None:
            parts.append(f"largest ratio {self.worst[1].ratio:.2g} ({_name(self.worst[1])})")
        less_exact = [row for section in self.sections for row in section.rows if row.plain_ratio]
        if less_exact:
            worst = max(less_exact, key=lambda row: row.plain_ratio)
            parts.append(
                f"{len(less_exact)} values are less exact than PyTorch's because MLX sums in fp32, "
                f"up to {worst.plain_ratio:.2g} times the noise ({_name(worst)})"
            )
        if self.curve is not None:
            sums = f", with sums in fp32; {self.curve.plain_worst:.2g} without" if self.curve.plain_worst else ""
            parts.append(f"curve of {len(self.curve.gap)} steps within {self.curve.worst:.2g}{sums}")
        return "; ".join(parts)

    def _difference(self) -> str:
        parts = []
        if self.differences:
            parts.append(f"the models differ: {some(self.differences)}")
        if self.unequal_weights:
            parts.append(f"weights differ: {some(self.unequal_weights)}")
        if self.rounded_weights:
            names = "it is" if len(self.rounded_weights) == 1 else "they are"
            parts.append(
                f"{some(self.rounded_weights)}: equal but for rounding; if {names} computed by mx and by torch, "
                "compute with numpy in both files"
            )
        origins = self._origins()
        over = [(section, row) for section in self.sections for row in section.rows if not row.passed]
        if origins:
            section, row = origins[0]
            own = row.own or row.judgement
            reason = own.note or f"{_number(own.ratio)} times the noise on equal inputs"
            where = f", in its {_pass_of(row.own_part)}" if row.own_part and not own.note else ""
            others = self.differing()[1:]
            more = f"; also {some(others)}" if others else ""
            parts.append(f"differs here: {_name(row)} ({section.title}), {reason}{where}{more}")
        elif over:
            section, row = over[0]
            reason = row.note or f"{_number(row.ratio)} times the noise"
            parts.append(f"over the tolerance: {_name(row)} ({section.title}), {reason}")
        if self.curve is not None and not self.curve.passed:
            parts.append(
                f"the training curves differ: {_number(self.curve.worst)} times the noise "
                f"at step {self.curve.worst_step + 1}"
            )
        remedies = [f"{_name(row)}: {row.remedy}" for _, row in over if row.remedy]
        parts += remedies[:1]
        if (self.curve is not None and not self.curve.passed) or any(_is_backward(row) for _, row in over):
            parts += [f"a possible cause is {line}" for line in self.ties()[:1]]
        if not self.sections:  # nothing was computed
            return "; ".join(parts)
        return "; ".join(parts) + f" (allowed: {FACTOR:g})"

    def as_dict(self) -> dict[str, Any]:
        """Returns the report in JSON types. JSON has no infinities and NaNs, so they are strings."""
        curve = None
        if self.curve is not None:
            curve = {key: getattr(value, "tolist", lambda v=value: v)() for key, value in asdict(self.curve).items()}
        plain: dict[str, Any] = _json(
            {
                "passed": self.passed,
                "verdict": self.verdict(),
                "factor": FACTOR,
                "dtype": self.dtype,
                "engines": self.engines,
                "weights": {"compared": self.num_weights, "unequal": self.unequal_weights},
                "shared": self.shared,
                "differences": self.differences,
                "notes": self.notes,
                "differing": self.differing(),
                "sections": [
                    {"title": s.title, "passed": s.passed, "rows": [_row_dict(row) for row in s.rows]}
                    for s in self.sections
                ],
                "curve": curve,
                "losses": self.losses,
            }
        )
        return plain

    # ---- terminal ----------------------------------------------------------------------------------------

    def render(self, console: Console | None = None, verbose: bool = False) -> None:
        """Prints header, tables and verdict. Without `verbose` the tables leave out most rows that pass.

        Args:
            console: The console of rich that prints; by default standard output.
            verbose: Whether to print every row.
        """
        from rich.text import Text

        from icenet.core.report.console import new_console

        console = console or new_console()

        for role, engine in self.engines.items():
            text = f"{engine['framework']} {engine['version']} on {engine['device']}"
            text += ", float64" if role == "reference" else f", {self.dtype}, TF32 {engine['tf32']}"
            console.print(Text(f"{role:<10}{text}"), highlight=False)
        if self.num_weights:
            state = f"{some(self.unequal_weights)} differ" if self.unequal_weights else "equal bit for bit"
            console.print(Text(f"{'weights':<10}{self.num_weights} parameters: {state}"), highlight=False)
        tied = [f"{path} is tied to {owner}" for path, owner in self.shared.items()]
        for label, lines in (("shared", tied), ("differs", self.differences), ("note", self.notes)):
            for line in lines:
                console.print(Text(f"{label:<10}{line}"), highlight=False)
        for section in self.sections:
            shown = list(section.rows) if verbose else list(_interesting(section.rows))
            console.print(self._table(section, shown))
            if len(shown) < len(section.rows):
                more = f"    ... {len(section.rows) - len(shown)} more within the tolerance"
                console.print(Text(more, style="dim"), highlight=False)
            for row in shown:
                if remarks := "; ".join(filter(None, (row.note, row.remedy, row.ties, _less_exact(row)))):
                    console.print(Text(f"    {_name(row)}: {remarks}"), highlight=False)
        if self.curve is not None:
            c = self.curve
            console.print(
                Text(
                    f"training curve, {len(c.gap)} steps: largest gap {c.gap.max():.2g}, noise {c.noise.max():.2g}, "
                    f"worst ratio {_number(c.worst)} at step {c.worst_step + 1} "
                    f"(step by step {_number(c.strict)} at {c.strict_step + 1})"
                ),
                highlight=False,
            )
        style = "bold green" if self.passed else "bold red"
        console.print(Text(self.verdict(), style=style), highlight=False)

    def _table(self, section: Section, shown: list[Row]) -> Table:
        from rich.table import Table
        from rich.text import Text

        worst = section.worst
        summary = f"{len(section.rows)} values, worst ratio {_number(worst.ratio)}" if worst else "no values"
        table = Table(title=f"{section.title}: {summary}", title_justify="left", title_style="bold", box=None)
        table.add_column("", width=1)
        table.add_column("value", overflow="fold")
        for heading in ("shape", "error", "noise", "ratio", "replay"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("")
        for row in shown:
            style = "" if row.passed else ("red" if row.mark == DIFFERS else "yellow")
            cells = (
                "✓" if row.passed else "✗",
                _name(row),
                "×".join(map(str, row.shape)) or "1",
                _number(row.judgement.error),
                _number(row.judgement.noise),
                _number(row.judgement.ratio),
                _number(row.own.ratio) if row.own else "",
                row.mark or ("less exact" if row.plain_ratio else "ties" if row.ties else ""),
            )
            table.add_row(*(Text(cell) for cell in cells), style=style)
        return table


def _interesting(rows: list[Row]) -> Iterator[Row]:
    """Yields rows with a remark, and those over the tolerance with the row before them; without any, the worst."""
    failing = [index for index, row in enumerate(rows) if not row.passed or row.mark]
    wanted = {index for index, row in enumerate(rows) if row.plain_ratio or row.ties}
    if failing:
        wanted |= {index for index in failing if rows[index].mark != PROPAGATED}
        wanted |= set(failing[:_WORST_SHOWN]) | {max(failing[0] - 1, 0)}
    else:
        wanted |= set(sorted(range(len(rows)), key=lambda index: -rows[index].ratio)[:_WORST_SHOWN])
    yield from (rows[index] for index in sorted(wanted))


def _less_exact(row: Row) -> str:
    """Returns a remark on a row that passes because MLX sums in fp32; else empty."""
    if not row.plain_ratio:
        return ""
    return f"less exact, {_number(row.plain_ratio)} times the noise, because MLX sums term by term in fp32"


def _name(row: Row) -> str:
    if row.kind == "module":
        return row.path or "(model output)"
    return "loss" if row.kind == "loss" else f"{row.kind} {row.path}" if row.kind == "gradient" else row.path


def _is_backward(row: Row) -> bool:
    """Returns whether a gradient is over the tolerance, in the run or in a replay."""
    own = row.own is not None and not row.own.passed and not row.own_part.startswith("output")
    return (row.kind == "gradient" and not row.passed) or own


def _pass_of(part: str) -> str:
    """Returns "forward pass" or "backward pass (...)" for a value of a replay."""
    return "forward pass" if part.startswith("output") else f"backward pass ({part.replace('input', 'of input')})"


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.2g}" if math.isfinite(value) and value < 1e4 else ("∞" if math.isinf(value) else f"{value:.1e}")


def _row_dict(row: Row) -> dict[str, Any]:
    return {
        **asdict(row),
        "shape": list(row.shape),
        "ratio": row.ratio,
        "plain_ratio": row.plain_ratio,
        "passed": row.passed,
    }


def _json(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: _json(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_json(value) for value in item]
    if isinstance(item, float) and not math.isfinite(item):
        return "NaN" if math.isnan(item) else ("Infinity" if item > 0 else "-Infinity")
    return item
