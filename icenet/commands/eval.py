"""`icenet eval`: prints the perplexity of a text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import icenet
from icenet.core.report.console import new_console
from icenet.core.training.perplexity import Perplexity, evaluate_text


@dataclass(frozen=True)
class EvaluationReport:
    """The perplexity of a text, and the backend that computed it."""

    found: Perplexity
    backend: str

    def as_dict(self) -> dict[str, Any]:
        return {"perplexity": self.found.perplexity, **asdict(self.found), "backend": self.backend}

    def render(self) -> None:
        found, console = self.found, new_console(highlight=False, soft_wrap=True)
        console.print(f"perplexity {found.perplexity:,.4f}, loss {found.loss:.6f} nats per token")
        console.print(
            f"{found.tokens:,} tokens of {found.source}, in windows of {found.length:,}, {found.stride:,} apart, on "
            f"{self.backend}",
            markup=False,
        )
        for note in found.notes:
            console.print(note, markup=False)


def evaluate(
    path: Path,
    source: str,
    *,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    averaged: bool = False,
    quantize: int | None = None,
    group_size: int | None = None,
    quiet: bool = False,
    **options: Any,
) -> EvaluationReport:
    """Returns the perplexity of a text under a model.

    Args:
        path, backend, device, dtype, averaged, quantize, group_size: See `icenet.load`.
        source, options: See `icenet.core.training.perplexity.evaluate_text`.
        quiet: Show no progress.
    """
    model = icenet.load(
        path, backend, device, dtype=dtype, averaged=averaged, quantize=quantize, group_size=group_size
    )
    found = evaluate_text(model, source, quiet=quiet, **options)
    return EvaluationReport(found, model.backend)
