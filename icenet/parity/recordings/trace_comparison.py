"""A comparison with a recorded trace, without the module of the reference.

A comparison asks its reference for runs, replays of single calls, a loss, updates and training steps. A
`RecordedSide` returns what the trace has of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from icenet.core import backends
from icenet.core.errors import UsageError
from icenet.parity.arguments import Progress
from icenet.parity.calls.events import Run
from icenet.parity.calls.module_side import ModuleSide
from icenet.parity.calls.pairs import Pair, Replay
from icenet.parity.causes import search
from icenet.parity.causes.numbers import attributes
from icenet.parity.inputs import Inputs
from icenet.parity.recordings.recorded_side import RecordedSide
from icenet.parity.recordings.trace import RecordedTrace
from icenet.parity.results.report import Report
from icenet.parity.stages.order import run_stages
from icenet.parity.state import Comparison
from icenet.parity.trace import Value

Array = npt.NDArray[Any]


def check(
    a: Any,
    trace: RecordedTrace,
    stages: Sequence[str],
    dtype: str,
    steps: int | None,
    options: dict[str, Any],
    progress: Progress | None = None,
) -> Report:
    """Compares a module with a trace; see `icenet.parity.compare` for the arguments.

    Raises:
        UsageError: The module is of PyTorch and the trace of MLX, or an option is not that of the recording.
    """
    backend = backends.backend_of(a)
    if (backend, trace.backend) == ("torch", "mlx"):
        raise UsageError(
            f"{trace.folder}: is a trace of MLX, which has no float64; record the module of PyTorch instead, and "
            "check that of MLX"
        )
    if dtype != trace.dtype:
        raise UsageError(f"{trace.folder}: was recorded in {trace.dtype}, not {dtype}; pass dtype={trace.dtype!r}")
    for name, was_given, action in (
        ("loss", trace.has_loss, "loss=(function, None)"),
        ("optimizer", trace.has_optimizer, "optimizer=(optimizer, None)"),
    ):
        if was_given and options[name] is None:
            raise UsageError(f"{trace.folder}: was recorded with {name}=; pass that of the module, {action}")
        if options[name] is not None and not was_given:
            raise UsageError(f"{trace.folder}: was recorded without {name}=; pass none, or record it with one")
    if "training" in stages and trace.training is not None and steps is not None and steps > trace.steps:
        raise UsageError(f"{trace.folder}: has {trace.steps} training steps, not {steps}")
    steps = trace.steps if steps is None and trace.training is not None else steps
    comparison = TraceComparison(a, trace, stages, steps, options)
    comparison.tell = progress or comparison.tell
    return run_stages(comparison, [trace.inputs_for(backend)])


class TraceComparison(Comparison):
    """A comparison with a trace.

    Args:
        a: The module under test.
        trace: The trace.
        stages, steps: See `compare`.
        options: See `Comparison`.
    """

    computes_reference = False
    judges_ties = False  # the trace has inputs without ties

    def __init__(
        self, a: Any, trace: RecordedTrace, stages: Sequence[str], steps: int | None, options: dict[str, Any]
    ) -> None:
        self._trace = trace
        self._b, self._reference = RecordedSide(trace, exact=False), RecordedSide(trace, exact=True)
        names = type(a).__name__, trace.name
        test = ModuleSide(a, trace.dtype).as_test()
        super().__init__(test, self._b, self._reference, names, stages, trace.dtype, trace.seed, steps, options)
        self.report.notes.append(f"b is the trace in {trace.folder}")

    def reference_run(self, inputs: Inputs, *arguments: Any) -> Run:
        self.inputs_b = self._trace.inputs.values
        return self._reference.record(inputs.given, self.inputs_b, self.store, *arguments)

    def replay_of(self, pair: Pair, gradients: bool) -> Replay:
        return self._reference.replay_of(pair, gradients)

    def b_replay(self, given: Replay) -> dict[str, Value]:
        return self._b.replay(given)

    def rate(self, names: Sequence[str], gradients: Mapping[str, Array]) -> float:
        return self._trace.rate

    def propagated(
        self, exact: Mapping[str, Value], pairs: list[Pair], gradients: bool = True, quick: bool = False
    ) -> dict[str, Array]:
        kind = "in_order" if self.b.backend == "torch" else "noise"
        noise = self._trace.samples[self._b.run_mode][kind]
        return {name: noise[name] for name in exact if name in noise}

    def suggest(self, pair: Pair, judgements: Mapping[str, Any]) -> None:
        search.set_cause(self, pair, judgements)
        if not self.report.cause and (hint := self._hint(pair)):
            self.report.cause = hint

    def _hint(self, pair: Pair) -> str:
        """Returns an attribute that differs, which is not tried: the reference is not there."""
        ours = attributes(self.a.modules[pair.a.path])
        for meaning, (name, value) in self._trace.modules[pair.path]["attributes"].items():
            own, other = ours.get(meaning, ("", None))
            if type(other) in (int, float) and other != value:
                return f"{own} is {other} in a" + (f", {value} in b" if own == name else f", {name} is {value} in b")
        return ""
