"""The report of a port: what was compared, and the sizes that the port does not serve."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from icenet.parity.ports.limits import Guard
from icenet.parity.yardstick import FACTOR

ROUNDING = 4 * FACTOR
"""The largest ratio of gradients that is rounding if they agree with the layers of the other kind."""


@dataclass
class Check:
    """One comparison: the outputs, the gradients or the buffers of a mode, on inputs of some sizes."""

    mode: str
    sizes: str
    what: str
    ratio: float
    """The largest difference from float64, as a multiple of the noise (see `icenet.parity.yardstick`)."""
    difference: float
    """The largest difference, relative to the largest value."""
    name: str
    """The output, parameter or buffer with the largest ratio."""
    note: str = ""
    """Why it cannot be compared: another shape or dtype, for example."""
    layers: str = "mlx"
    """Whose layers compute: "mlx", or "icenet" for those that IceNet computes with its own operations."""
    is_rounding: bool = False
    """Whether a ratio over the tolerance is rounding in these layers (see `settle`)."""

    @property
    def passed(self) -> bool:
        return self.is_rounding or self.ratio <= FACTOR


@dataclass
class PortReport:
    """The comparisons of a port, and what could not be compared."""

    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    culprit: str = ""
    """The first operation that differs, and the original's line."""
    fixed: dict[str, dict[int, int]] = field(default_factory=dict)
    """The sizes, by dimension, of each input that the original may have at another size and the port may not."""
    limits: dict[str, dict[int, list[int | None]]] = field(default_factory=dict)
    """The least and the largest size, by dimension, of each input, beyond which the original computes otherwise."""
    guards: list[Guard] = field(default_factory=list)
    """Other conditions on the sizes, outside of which the original computes otherwise."""
    is_empty: bool = False
    """Whether no output of the example has a finite value, so that the comparison shows nothing."""

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        checks = [{**vars(check), "passed": check.passed} for check in self.checks]
        return {
            "passed": self.passed,
            "factor": FACTOR,
            "culprit": self.culprit,
            "checks": checks,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        worst = max(self.checks, key=lambda check: (not check.is_rounding, check.ratio), default=None)
        head = "the port computes what the module computes" if self.passed else f"the port differs: {self.culprit}"
        if self.passed and self.is_empty:
            head = "not shown that the port computes what the module computes: see the notes"
        lines = [f"{head} (largest ratio {worst.ratio:.2g} of {FACTOR})" if worst else "nothing was compared"]
        for check in self.checks:
            mark = "ok " if check.passed else "BAD"
            own = "" if check.layers == "mlx" else ", with IceNet's layers"
            lines.append(
                f"  {mark} {check.mode:<10} {check.what:<9} {check.sizes:<28} ratio {check.ratio:.2g}, "
                f"difference {check.difference:.1e} ({check.name}{': ' if check.note else ''}{check.note}){own}"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def settle(report: PortReport) -> None:
    """Marks gradients as rounding that differ with the layers of MLX and agree with those of IceNet, or vice versa.

    Both compute the same source and the same settings of its layers, so what is wrong there differs with both. Batch
    norm of few values and a ReLU after it turn a rounding into another gradient: of 22 ResNet-50 with random weights
    two differed, by 10 and 18 times the noise, in training mode on two images of 64 x 64.
    """
    names = {"mlx": "MLX's", "icenet": "IceNet's"}
    for check in report.checks:
        agrees = any(
            (other.mode, other.sizes, other.what) == (check.mode, check.sizes, check.what) and other.ratio <= FACTOR
            for other in report.checks
            if other.layers != check.layers
        )
        if check.what != "gradients" or check.passed or check.note or check.ratio > ROUNDING or not agrees:
            continue
        check.is_rounding = True
        own, other = names[check.layers], names["icenet" if check.layers == "mlx" else "mlx"]
        report.notes.append(
            f"with {own} layers the gradient of {check.name} in {check.mode} mode on {check.sizes} differs by "
            f"{check.ratio:.2g} times the noise; with {other} it agrees, so this is rounding in the layers"
        )


def limit_text(low: int | None, high: int | None) -> str:
    """Returns a range of sizes as text; None is no limit."""
    return f"at most {high}" if low is None else f"at least {low}" if high is None else f"{low} to {high}"
