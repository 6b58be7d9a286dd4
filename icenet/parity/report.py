"""A parity report: a header, tables, one line of verdict; as text for people and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from icenet.parity.locate import DIFFERS, INHERITS, Row
from icenet.parity.yardstick import FACTOR, CurveJudgement

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WORST_SHOWN = 3


@dataclass
class Section:
    """One comparison: the forward pass in evaluation, the gradients, ..."""

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
    """What a parity run found.

    Attributes:
        dtype: of the arithmetic under test.
        engines: what is known of "MLX", "PyTorch" and "reference": framework, version, device, TF32.
        unequal_weights: parameters whose initial values are not equal bit for bit.
        sections: the comparisons.
        curve: of the training run, with the three curves in `losses`, where steps were asked for.
    """

    dtype: str
    engines: dict[str, dict[str, str]]
    num_weights: int = 0
    unequal_weights: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    curve: CurveJudgement | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        curve = self.curve is None or self.curve.passed
        return not self.unequal_weights and curve and all(section.passed for section in self.sections)

    @property
    def worst(self) -> tuple[Section, Row] | None:
        """The row with the largest ratio."""
        rows = [(section, row) for section in self.sections for row in section.rows]
        return max(rows, key=lambda pair: pair[1].ratio, default=None)

    def differing(self) -> list[str]:
        """The layers marked "differs here", in the order of the run."""
        found = [_name(row) for section in self.sections for row in section.rows if _is_origin(row)]
        return list(dict.fromkeys(found))

    def verdict(self) -> str:
        """One line: that all agree, or what differs first, by how much."""
        if self.passed:
            count = sum(len(section.rows) for section in self.sections)
            told = [f"MLX agrees with PyTorch in {self.dtype}: {count} values within {FACTOR:g} times the noise"]
            if self.worst is not None:
                told.append(f"largest ratio {self.worst[1].ratio:.2g} ({_name(self.worst[1])})")
            if self.curve is not None:
                told.append(f"curve of {len(self.curve.gap)} steps within {self.curve.worst:.2g}")
            return "; ".join(told)
        reasons = []
        if self.unequal_weights:
            reasons.append(f"weights differ: {_some(self.unequal_weights)}")
        origins = [(s, row) for s in self.sections for row in s.rows if _is_origin(row)]
        if origins:
            section, row = origins[0]
            ratio = f"{_number(row.own.ratio)} times the noise on equal inputs" if row.own else ""
            part = f", in its {_part(row.own_part)}" if row.own_part else ""
            more = f"; {_some(self.differing()[1:])} too" if len(self.differing()) > 1 else ""
            reasons.append(f"differs here: {_name(row)} ({section.title}), {ratio}{part}{more}")
        else:
            over = [(s, row) for s in self.sections for row in s.rows if not row.passed]
            if over:
                section, row = over[0]
                what = row.note or f"{_number(row.ratio)} times the noise"
                reasons.append(f"over the yardstick: {_name(row)} ({section.title}), {what}")
        if self.curve is not None and not self.curve.passed:
            reasons.append(
                f"the curves part: {_number(self.curve.worst)} times the noise at step {self.curve.worst_step}"
            )
        return "; ".join(reasons) + f" (allowed: {FACTOR:g})"

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values; numbers that are not finite as texts, for JSON has none."""
        curve = None
        if self.curve is not None:
            curve = {key: getattr(value, "tolist", lambda v=value: v)() for key, value in asdict(self.curve).items()}
        told: dict[str, Any] = _json(
            {
                "passed": self.passed,
                "verdict": self.verdict(),
                "factor": FACTOR,
                "dtype": self.dtype,
                "engines": self.engines,
                "weights": {"compared": self.num_weights, "unequal": self.unequal_weights},
                "differing": self.differing(),
                "sections": [
                    {"title": s.title, "passed": s.passed, "rows": [_row_dict(row) for row in s.rows]}
                    for s in self.sections
                ],
                "curve": curve,
                "losses": self.losses,
            }
        )
        return told

    # ---- on the screen -----------------------------------------------------------------------------------

    def render(self, console: Console, verbose: bool = False) -> None:
        """Prints header, tables and verdict. Rows that pass are shown in part, unless `verbose`."""
        from rich.text import Text

        for role, facts in self.engines.items():
            text = f"{facts['framework']} {facts['version']} on {facts['device']}"
            text += ", float64" if role == "reference" else f", {self.dtype}, TF32 {facts['tf32']}"
            console.print(Text(f"{role:<10}{text}"), highlight=False)
        if self.num_weights:
            state = f"{_some(self.unequal_weights)} differ" if self.unequal_weights else "equal bit for bit"
            console.print(Text(f"{'weights':<10}{self.num_weights} parameters: {state}"), highlight=False)
        for section in self.sections:
            console.print(self._table(section, verbose))
        if self.curve is not None:
            c = self.curve
            console.print(
                Text(
                    f"training curve, {len(c.gap)} steps: largest gap {c.gap.max():.2g}, noise {c.noise.max():.2g}, "
                    f"worst ratio {_number(c.worst)} at step {c.worst_step} "
                    f"(step by step {_number(c.strict)} at {c.strict_step})"
                ),
                highlight=False,
            )
        style = "bold green" if self.passed else "bold red"
        console.print(Text(self.verdict(), style=style), highlight=False)

    def _table(self, section: Section, verbose: bool) -> Table:
        from rich.table import Table
        from rich.text import Text

        shown = list(section.rows) if verbose else list(_interesting(section.rows))
        worst = section.worst
        told = f"{len(section.rows)} values, worst ratio {_number(worst.ratio)}" if worst else "nothing to compare"
        table = Table(title=f"{section.title}: {told}", title_justify="left", title_style="bold", box=None)
        table.add_column("", width=1)
        table.add_column("value", overflow="fold")
        for heading in ("shape", "error", "noise", "ratio", "alone"):
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
                "; ".join(filter(None, (row.mark, row.note))),
            )
            table.add_row(*(Text(cell) for cell in cells), style=style)
        if len(shown) < len(section.rows):
            table.add_row("", Text(f"... {len(section.rows) - len(shown)} more within the yardstick"), style="dim")
        return table


def _interesting(rows: list[Row]) -> Iterator[Row]:
    """What is over the yardstick and, before the first of it, the last good one; else the worst few."""
    failing = [index for index, row in enumerate(rows) if not row.passed or row.mark]
    if not failing:
        ranked = sorted(range(len(rows)), key=lambda index: -rows[index].ratio)[:_WORST_SHOWN]
        yield from (rows[index] for index in sorted(ranked))
        return
    wanted = {index for index in failing if rows[index].mark != INHERITS}
    wanted |= set(failing[:_WORST_SHOWN]) | {max(failing[0] - 1, 0)}
    yield from (rows[index] for index in sorted(wanted))


def _is_origin(row: Row) -> bool:
    return row.kind == "module" and row.mark == DIFFERS


def _name(row: Row) -> str:
    if row.kind == "module":
        return row.path or "(model output)"
    return "loss" if row.kind == "loss" else f"{row.kind} {row.path}" if row.kind == "gradient" else row.path


def _part(part: str) -> str:
    return "forward pass" if part.startswith("output") else f"backward pass ({part.replace('input', 'of input')})"


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.2g}" if math.isfinite(value) and value < 1e4 else ("∞" if math.isinf(value) else f"{value:.1e}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _row_dict(row: Row) -> dict[str, Any]:
    told = asdict(row)
    return {**told, "shape": list(row.shape), "ratio": row.ratio, "passed": row.passed}


def _json(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: _json(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_json(value) for value in item]
    if isinstance(item, float) and not math.isfinite(item):
        return "NaN" if math.isnan(item) else ("Infinity" if item > 0 else "-Infinity")
    return item
