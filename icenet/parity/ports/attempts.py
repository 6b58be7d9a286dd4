"""The attempts at a port: the first has every size open; each further one is closer to the example."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from icenet.core import backends
from icenet.core.errors import PortError
from icenet.core.messages import some
from icenet.core.porting import build
from icenet.core.porting.build import Plan
from icenet.core.porting.record import refs
from icenet.parity.ports.inner_arguments import InnerArguments
from icenet.parity.ports.original import Export, Original
from icenet.parity.ports.other_arguments import OtherArguments, refusing
from icenet.parity.ports.pair import OriginalFails
from icenet.parity.ports.proof import Proof, locate
from icenet.parity.ports.report import PortReport


@dataclass
class Attempt:
    """One port of a module, and its comparison with the module."""

    export: Export
    plan: Plan
    model: Any
    report: PortReport
    exact_masks: bool = False

    @property
    def passed(self) -> bool:
        return self.report.passed


class Attempts:
    """Ports a module in several ways until one of them passes.

    Args:
        original: The module.
        is_nhwc: Whether the port takes and returns images with their channels last.
        progress: Called with the name of each stage when it begins.
    """

    def __init__(self, original: Original, is_nhwc: bool, progress: Callable[[str], None]) -> None:
        self.original, self.is_nhwc, self.progress = original, is_nhwc, progress

    def find(self) -> Attempt:
        """Returns the first attempt that passes, or the last one.

        Raises:
            PortError: The graph cannot be exported, the module returns no tensor, or an operation has no counterpart.
        """
        self.progress("exporting")
        export = self.original.export()
        if not list(refs(export.graph.output_tree)):
            raise PortError(f"{export.class_name} returns no tensor; a port needs one to compare")
        if missing := export.missing():
            raise PortError(describe_missing(missing))
        self.progress("writing the source")
        found = self._with_open_loops(export) if export.graph.loops else self._attempt(export)
        if not found.passed and self.original.has_batch_of_one:
            # a batch of 1 may be computed in another way than larger ones: `x.squeeze(0)`
            found = self._attempt(self.original.export(widened=False, open_loops=False))
        if any(check.what == "gradients" and math.isinf(check.ratio) for check in found.report.checks):
            exact = self._attempt(found.export, exact_masks=True)
            if exact.passed:
                exact.report.notes.append(
                    "exact_where drops gradients that are not finite where a mask leaves values out"
                )
                return exact
        return found

    def refusal(self, attempt: Attempt) -> PortError:
        """Returns the error for an attempt that does not pass, which names the operation that differs."""
        export, report = attempt.export, attempt.report
        culprit = locate(attempt.plan, export.program, self.original.module, self.original.example, report)
        functions = [*export.graph.functions, *(export.train.functions if export.train is not None else ())]
        if functions and all(check.passed for check in report.checks if check.what != "gradients"):
            culprit += f"; {functions[0]} has a backward of its own, which a port cannot have"
        with backends.module("mlx", "tools.calls").on_another_device() as moved:
            if moved and self._attempt(export).passed:
                culprit += "; on a CPU it agrees, so a kernel of MLX is wrong on this device, for these shapes"
        report.culprit = culprit
        return PortError(f"the port of {export.class_name} differs: {culprit}\n{report}")

    def _with_open_loops(self, export: Export) -> Attempt:
        """Returns an attempt whose loops have any number of steps, or else the number of the example."""
        try:
            found = self._attempt(export)
            if found.passed:
                return found
        except PortError:
            pass
        return self._attempt(self.original.export(open_loops=False))

    def _attempt(self, export: Export, exact_masks: bool = False) -> Attempt:
        """Writes a port and compares it with the original."""
        written = self._plan(export, self.is_nhwc, exact_masks)
        model = export.make(written)
        compared, compared_model = written, model
        if self.is_nhwc:  # the proof gives images with PyTorch's axes
            compared = self._plan(export, False, exact_masks)
            compared_model = export.make(compared)
        layers = backends.module("mlx", "porting.layers")
        accelerated = layers.accelerate(export.make(compared))
        proof = Proof(
            compared,
            compared_model,
            self.original.module,
            export.program,
            self.original.example,
            accelerated if layers.is_accelerated(accelerated) else None,
            self.progress,
        )
        try:
            report = proof.compare()
        except OriginalFails:
            # PyTorch may export a module that it cannot run: 2.11 does with ids that are no integers
            self.original.check_call()
            raise
        report.notes += export.notes
        return Attempt(export, written, model, report, exact_masks)

    def with_other_arguments(self, attempt: Attempt) -> tuple[Callable[[str], str], list[str]]:
        """Tries the classes of an attempt with other arguments than those of the original.

        Returns:
            A function that returns a source of the port whose constructors refuse the arguments with which it
            differs, and notes.
        """
        self.progress("trying other arguments")
        plan = self._plan(attempt.export, False, attempt.exact_masks) if self.is_nhwc else attempt.plan
        given = self.original.module, attempt.export.weights, self.original.example
        whole, inner = OtherArguments(plan, *given), InnerArguments(plan, *given)
        whole.try_all()
        inner.try_all()
        refused = inner.wrong
        if refused and whole.right:  # with which the inner classes may have other arguments
            guarded = OtherArguments(replace(plan, source=_refusing(plan.source, refused)), *given)
            guarded.try_all()
            refused = refused if guarded.wrong.keys() <= whole.wrong.keys() else {}
        notes = [
            f"{kind}: the methods have numbers that depend on {some(wrong, 8)}; "
            + ("another value is an error" if kind in refused else "compare a model with another value")
            for kind, wrong in inner.wrong.items()
        ]
        if whole.wrong:
            refused = {**refused, plan.class_name: {name: [value] for name, value in whole.wrong.items()}}
        return lambda source: _refusing(source, refused), [*whole.notes(), *inner.notes(), *notes]

    def in_dtype(self, attempt: Attempt, dtype: str) -> Plan:
        """Returns the plan of an attempt for weights of a dtype of MLX, such as "bfloat16"."""
        return self._plan(attempt.export, self.is_nhwc, attempt.exact_masks, dtype)

    @staticmethod
    def _plan(export: Export, is_nhwc: bool, exact_masks: bool, dtype: str = "float32") -> Plan:
        title = f"{export.class_name} in MLX, ported from PyTorch."
        return build.plan(export.graph, export.train, is_nhwc, title, exact_masks=exact_masks, dtype=dtype)


def _refusing(source: str, wrong: dict[str, dict[str, list[Any]]]) -> str:
    for kind, arguments in wrong.items():
        source = refusing(source, kind, arguments)
    return source


def describe_missing(missing: dict[str, list[str]]) -> str:
    """Returns the number of missing operations, and a line for each with its count and its first place."""
    first = (
        f"{len(missing)} operations have no counterpart:" if len(missing) > 1 else "1 operation has no counterpart:"
    )
    lines = [
        f"  aten.{op}: {'once, at' if len(places) == 1 else f'{len(places)} times, first at'} {places[0]}"
        for op, places in sorted(missing.items())
    ]
    return "\n".join([first, *lines])
