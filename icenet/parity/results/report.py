"""The report of `icenet.parity.compare`: its result as text, as JSON and as a page."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from icenet.parity.results.result import Result
from icenet.parity.results.status import (
    CONTAINS,
    DIFFERS,
    FAILED,
    INHERITS,
    LESS_EXACT,
    NOT_RUN,
    PASSED,
    SKIPPED,
    number,
)


@dataclass
class Report(Result):
    """The result of a comparison; `str(report)` is text for a terminal."""

    def __str__(self) -> str:
        """Returns the verdict, the stages and the tree of the modules, as plain text."""
        return "\n".join([self.verdict, *self._lines()])

    def _lines(self) -> Iterator[str]:
        yield ""
        for stage in self.stages:
            note = f"  {stage.note}" if stage.note else ""
            yield f"  {_MARKS.get(stage.status, ' ')} {stage.name:<10} {stage.status:<8}{note}"
        yield ""
        depth, names = {"": 0}, {"": "(model)"}
        for module in self.modules:
            for child in module.children:
                depth[child] = depth.get(module.path, 0) + 1
                names[child] = child[len(module.path) + 1 :] if module.path else child
            same = module.class_a == module.class_b
            classes = module.class_b if same else " | ".join(filter(None, (module.class_a, module.class_b)))
            name = names.get(module.path, module.path)  # with the list that holds it, which is no line
            ratio = f"  {number(module.ratio)}" if module.ratio else ""
            status = "" if module.status == PASSED else f"  {module.status}"
            remarks = "; ".join(filter(None, (module.where, *module.notes)))
            remark = f"  ({remarks})" if remarks else ""
            indent = "  " * depth.get(module.path, 0)
            yield f"  {_MARKS.get(module.status, ' ')} {indent}{name}: {classes}{ratio}{status}{remark}"
        is_less_exact = any(module.status == LESS_EXACT for module in self.modules)
        if not self.passed:
            yield ""
            yield f"  a is {self.names[0]}, under test; b is {self.names[1]}, the reference."
        elif is_less_exact:
            yield ""
        if not self.passed or is_less_exact:
            yield "  A number is the error of a in units of the rounding error of b; up to 8 is rounding."
        if is_less_exact:
            yield "  less exact: within the error of sums in fp32 that are taken term by term, as MLX's are"
        if not self.passed:
            yield "  ✗ the difference begins here   · contains it   ~ differs only because its inputs do"
        for note in self.notes:
            yield f"  note: {note}"
        if self.replay:
            yield f"  the smallest input that differs: {self.replay}"

    def as_dict(self) -> dict[str, Any]:
        """Returns the report in JSON types. JSON has no infinities and NaNs, so they are strings."""
        plain: dict[str, Any] = to_json(
            {
                "passed": self.passed,
                "verdict": self.verdict,
                **{name: value for name, value in asdict(self).items() if name not in ("stages", "modules")},
                "stages": [
                    {**asdict(stage), "rows": [{**asdict(row), "passed": row.passed} for row in stage.rows]}
                    for stage in self.stages
                ],
                "modules": [asdict(module) for module in self.modules],
            }
        )
        return plain

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the report as one HTML page that needs no other file; returns its path."""
        from icenet.parity.results.html import write  # the page is not needed to compare

        return write(self, path)


_MARKS = {
    PASSED: "✓", LESS_EXACT: "✓", FAILED: "✗", DIFFERS: "✗", CONTAINS: "·", INHERITS: "~", SKIPPED: "-", NOT_RUN: " "
}  # fmt: skip


def to_json(item: Any) -> Any:
    """Returns dicts, lists and numbers in JSON types."""
    if isinstance(item, dict):
        return {str(key): to_json(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [to_json(value) for value in item]
    if isinstance(item, float) and not math.isfinite(item):
        return "NaN" if math.isnan(item) else ("Infinity" if item > 0 else "-Infinity")
    return item
