"""Compares any two modules, of MLX, PyTorch or one of them, stage by stage: `icenet.parity.compare`."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.core.errors import UsageError
from icenet.core.messages import option
from icenet.core.weights.rename import Rename
from icenet.parity import inputs as drawing
from icenet.parity import smallest_inputs
from icenet.parity.arguments import Progress, check_options, check_pairs
from icenet.parity.calls import propagation, runs
from icenet.parity.calls.directions import divided
from icenet.parity.calls.events import Run
from icenet.parity.calls.module_side import ModuleSide
from icenet.parity.calls.pairs import Pair, Replay, Sample, cotangents_of, rounded
from icenet.parity.calls.sides import ModuleError
from icenet.parity.causes import search
from icenet.parity.inputs import Inputs
from icenet.parity.recordings.trace import RecordedTrace
from icenet.parity.recordings.trace_comparison import check
from icenet.parity.results import status as states
from icenet.parity.results.report import Report
from icenet.parity.results.status import ALL_STAGES
from icenet.parity.stages import training
from icenet.parity.stages.order import run_stages
from icenet.parity.state import Comparison
from icenet.parity.trace import Value
from icenet.parity.yardstick import Judgement

Array = npt.NDArray[Any]
Losses = tuple[Callable[..., Any], Callable[..., Any]]


def compare(
    a: Any,
    b: Any,
    inputs: Any = None,
    *,
    rename: Rename = None,
    stages: Sequence[str] = ALL_STAGES,
    dtype: str = "fp32",
    layout: str | Mapping[str, str] | None = None,
    loss: Losses | None = None,
    optimizer: tuple[Any, Any] | None = None,
    steps: int | None = None,
    seed: int = 0,
    draws: int | None = None,
    copy_weights: bool | None = None,
    replay: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compares two modules stage by stage and names the first module that differs. Both stay unchanged.

    Args:
        a: The module under test: any `mlx.nn.Module` or `torch.nn.Module`.
        b: The reference: any module of PyTorch or MLX, or a trace (`icenet.parity.read_trace`). If `a` is of PyTorch
            and `b` a module of MLX, they are exchanged.
        inputs: Arguments of `a`: an array, a tuple of arrays, or a dict of keyword arguments. Images `[B, H, W, C]`.
            None: drawn for the signature and the first layer, several times.
        rename: Path of a module of `a` to its path in `b`: a mapping, also of prefixes and with wildcards, or a
            function. That of `icenet.from_torch`, from names of PyTorch to names of MLX, is accepted as well and
            recognized by its names. Modules of equal paths need none.
        stages: Stages to run, some of ALL_STAGES. Each must pass before the next is run.
        dtype: Compute dtype: fp32, bf16 or fp16. Copies of the modules are converted to it.
        layout: How the inputs of `b` are made from those of `a`: "same", "channels_last" (`b` takes channels first,
            so the last axis is moved), or one of the two by the name or number of the input. Default: moved if the
            first layer of `b` that reads the input is a convolution, pooling or batch norm.
        loss: The loss of the outputs on each side, as functions of the output of the module; default: the mean
            squared distance from random targets.
        optimizer: The optimizer of each side: an `mlx.optimizers.Optimizer`, a class of `torch.optim` or a `partial`
            of it, or a function of the module; default: SGD with momentum.
        steps: Number of free-running training steps; default: 2, or 1 for more than a million parameters or values
            that all modules together return.
        seed: Seed of drawn inputs, cotangents and targets.
        draws: Number of random inputs, if none are given; default: 3.
        copy_weights: Whether to compare with the weights of `b` in a copy of `a`. False: with those that `a` has;
            unequal ones are a difference. None: they are copied if most of the weights of `a` have nothing in common
            with those of `b`, because they are still the initial ones; the first line of the report says so.
        replay: Where to save the smallest input that differs; default: it is not searched for.
        progress: Called with the name of the stage, the finished part of its work, and all of it.

    Returns:
        The report.

    Raises:
        UsageError: An argument is not a module, an option is wrong, or `b` fails on the inputs.
        FileError: The disk is too full for arrays above 2 GB, which are kept in temporary files.
    """
    stages = check_options(stages, dtype, inputs, draws, steps, seed)
    check_pairs(rename, loss, optimizer, copy_weights)
    options = {"rename": rename, "layout": layout, "loss": loss, "optimizer": optimizer, "copy_weights": copy_weights}
    if isinstance(b, RecordedTrace):
        if inputs is not None or layout is not None or draws is not None or replay is not None:
            raise UsageError("compare: a trace has its inputs; give no inputs, layout, draws or replay")
        return check(a, b, stages, dtype, steps, options, progress)
    with _host_generators_kept():
        comparison = ModuleComparison(a, b, stages, dtype, seed, steps, options)
        comparison.tell = progress or comparison.tell
        given = comparison.drawn(draws or 3) if inputs is None else [drawing.read(inputs, dtype)]
        report = run_stages(comparison, given)
        if replay is not None and not report.passed:
            comparison.shrink(replay)
    return report


@contextlib.contextmanager
def _host_generators_kept() -> Iterator[None]:
    """Restores the generators of Python and numpy on exit."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class ModuleComparison(Comparison):
    """A comparison of two modules.

    Args:
        a, b, stages, dtype, seed, steps: See `compare`.
        options: `rename`, `layout`, `loss`, `optimizer` and `copy_weights` of `compare`.
    """

    def __init__(
        self,
        a: Any,
        b: Any,
        stages: Sequence[str],
        dtype: str,
        seed: int,
        steps: int | None,
        options: dict[str, Any],
    ) -> None:
        notes = []
        backend = backends.backend_of(b)
        if (backends.backend_of(a), backend) == ("torch", "mlx"):
            a, b, backend = b, a, "torch"
            options = {**options, **{name: (pair := options[name]) and pair[::-1] for name in ("loss", "optimizer")}}
            notes = ["a and b are exchanged: PyTorch is the reference, because it computes in float64"]
        self.user_a, self.user_b = a, b
        names = type(a).__name__, type(b).__name__
        if backends.backend_of(a) == "mlx" and backend == "torch":
            b = divided(a, b)
        sides = (
            ModuleSide(a, dtype).as_test(),
            ModuleSide(b, dtype, perturbed=backend == "mlx"),
            ModuleSide(b, dtype, exact=True),
        )
        super().__init__(*sides, names, stages, dtype, seed, steps, options, notes)

    def drawn(self, draws: int) -> list[Inputs]:
        """Returns random inputs that the reference accepts.

        Raises:
            UsageError: The module does not show what it takes, or the reference accepts none of the inputs.
        """
        found = []
        for number in range(draws):
            failure: ModuleError | None = None
            for inputs in drawing.draw(self.a, self.user_a, self.seed, number, self.dtype):
                self.set_mode(False)
                try:
                    self.reference_run(inputs)
                except ModuleError as error:
                    failure = failure or error
                    continue
                finally:
                    self.store.free()
                found.append(inputs)
                break
            else:
                assert failure is not None
                taken = drawing.describe_signature(self.user_a)
                problem = f"b fails on drawn ones: {failure.reason}"
                raise UsageError(f"compare: {taken}: {problem}; pass {option('inputs')}") from failure
        return found

    # ---- what the reference provides ------------------------------------------------------------------------

    def reference_run(self, inputs: Inputs, *arguments: Any) -> Run:
        return runs.reference_run(self, inputs, *arguments)

    def replay_of(self, pair: Pair, gradients: bool) -> Replay:
        inputs = pair.inputs("b") if pair.larger is None else pair.larger
        values = [rounded(item, theirs.dtype) for item, theirs in zip(inputs, pair.inputs("noise"), strict=True)]
        dtypes = [item.dtype for item in pair.results("noise")]
        return Replay(pair, values, cotangents_of(pair, dtypes, self.seed) if gradients else None)

    def b_replay(self, given: Replay) -> dict[str, Value]:
        if self.b.perturbation is not None:
            return self.b.sampled_replay(given, Sample(0, rounds=True))
        return self.b.replay(given)

    def propagated(
        self, exact: Mapping[str, Value], pairs: list[Pair], gradients: bool = True, quick: bool = False
    ) -> dict[str, Array]:
        return propagation.propagated(self, exact, pairs, gradients, quick)

    def rate(self, names: Sequence[str], gradients: Mapping[str, Array]) -> float:
        return training.default_rate(names, self.reference.native_weights(names), gradients)

    def suggest(self, pair: Pair, judgements: Mapping[str, Judgement]) -> None:
        if self.options.get("suggest", True):
            search.set_cause(self, pair, judgements)

    def gradients_agree(self, inputs: Inputs, a: Any, b: Any) -> bool:
        options = {**self.options, "suggest": False, "vary": False, "copy_weights": True}
        stages = ["structure", "forward", "loss", "gradients"]
        other = ModuleComparison(a, b, stages, self.dtype, self.seed, 0, options)
        return run_stages(other, [inputs]).passed

    # ---- the smallest input ---------------------------------------------------------------------------------

    def shrink(self, path: str) -> None:
        """Finds the smallest input with which the same module differs, and saves it."""
        failed = self.report.failed_stage
        assert failed is not None
        if failed.name in ("weights", "optimizer", "training"):
            self.report.notes.append(
                f"no smaller input is searched for: the stage {failed.name} does not depend on it"
            )
            return
        stages = [stage.name for stage in self.report.stages if stage.status != states.SKIPPED]
        stages = stages[: stages.index(failed.name) + 1]
        losses = None if failed.name == "forward" else self.losses
        options = {**self.options, "suggest": False, "vary": False, "loss": losses}

        def differs(inputs: Inputs) -> bool:
            other = ModuleComparison(self.user_a, self.user_b, stages, self.dtype, self.seed, 0, options)
            try:
                report = run_stages(other, [inputs])
            except UsageError:  # b fails on it
                return False
            stage = report.failed_stage
            return stage is not None and (report.culprit, stage.name) == (self.report.culprit, failed.name)

        smallest = smallest_inputs.shrink(self.inputs_a, differs)
        self.report.replay = str(smallest_inputs.save(smallest, path))
