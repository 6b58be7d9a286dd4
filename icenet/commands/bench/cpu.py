"""`icenet bench cpu`: the processor time of training steps of both backends, for models of several kinds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from icenet.commands.bench import common, training
from icenet.commands.bench.training_rows import Options, Row


def _recurrent(kind: str, layers: int, width: int, rows: int, steps: int, *more: str) -> Row:
    """Returns the row of a recurrent model."""
    bidirectional = ", bidirectional" if more else ""
    sizes = (f"model.type={kind}", f"model.num_layers={layers}", f"model.hidden_size={width}")
    overrides = (*sizes, "model.vocab_size=1000", "model.dropout=0", *more)
    title = f"{kind.upper()}, {layers} x {width}{bidirectional}"
    return Row(title, "lstm-small", (rows, steps), (rows, steps), overrides)


ROWS = {
    "gpt-quickstart": Row("GPT, quickstart", "quickstart", (8, 64), (8, 64)),
    "gpt-small": Row("GPT, transformer-small", "transformer-small", (2, 128), (2, 128), ("model.dropout=0",)),
    "cnn-digits": Row("CNN, cnn-digits", "cnn-digits", (64, 8), (64, 8)),
    "gru-2x256": _recurrent("gru", 2, 256, 16, 64),
    "gru-4x512": _recurrent("gru", 4, 512, 16, 32),
    "rnn-2x256": _recurrent("rnn", 2, 256, 16, 64),
    "rnn-4x512": _recurrent("rnn", 4, 512, 16, 32),
    "lstm-1x128": _recurrent("lstm", 1, 128, 128, 64),
    "lstm-2x256": _recurrent("lstm", 2, 256, 16, 64),
    "lstm-2x256-wide": _recurrent("lstm", 2, 256, 32, 64),
    "lstm-2x256-bidirectional": _recurrent("lstm", 2, 256, 32, 64, "model.bidirectional=true"),
    "lstm-4x512": _recurrent("lstm", 4, 512, 16, 32),
    "lstm-4x512-wide": _recurrent("lstm", 4, 512, 64, 32),
}
"""The rows by name. Their sizes are the same on a GPU."""


class ProcessorReport(training.TrainingReport):
    """The results as one table: the processor time of a step of each side, and the ratio of IceNet's backends."""

    def render(self) -> None:
        output = common.console()
        rows = [self._line(result) for result in self.results]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines = [{column: row.get(column, "") for column in columns} for row in rows]
        output.print(common.table("Processor time of a training step", lines, columns[1:]))
        output.print()
        for line in (self.summary(), *self.notes):
            output.print(line, soft_wrap=True, markup=False)

    def _line(self, result: Mapping[str, Any]) -> dict[str, str]:
        times = {entry["side"]: entry["processor_s"] for entry in result["sides"]}
        line = {"model": result["title"].removeprefix("Training ")}
        line |= {f"{side}, ms": f"{1e3 * statistics.median(seconds):.4g}" for side, seconds in times.items()}
        if {"icenet mlx", "icenet torch"} <= times.keys():
            ratio = common.ratio(times["icenet mlx"], times["icenet torch"])
            line["mlx / torch"] = f"{ratio['median']:.2f}"
            line["quartiles"] = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        return line

    def summary(self) -> str:
        return (
            "Processor time of all threads, medians of the rounds; the ratio is the median of those of the rounds. "
            "Threads that wait for each other count: OMP_NUM_THREADS=1 leaves their time out."
        )


def run(rows: Mapping[str, Row], options: Options, notify: common.Notify = common.ignore) -> ProcessorReport:
    """Measures rows as `training.run` does."""
    found = training.run(rows, options, notify)
    return ProcessorReport(found.machine, found.rates, found.results, found.notes, found.interruption)
