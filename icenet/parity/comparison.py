"""Compares any two modules, of MLX, PyTorch or one of them, stage by stage: `icenet.parity.compare`."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.core.errors import UsageError
from icenet.core.weights.rename import Rename
from icenet.parity import align
from icenet.parity import inputs as drawing
from icenet.parity.arguments import check_options, check_pairs
from icenet.parity.calls import replays, runs
from icenet.parity.calls.events import Run, Store
from icenet.parity.calls.pairing import match_modules, opaque_layers, pair_calls
from icenet.parity.calls.pairs import Pair, Replay, Sample, cotangents_of, rounded
from icenet.parity.calls.run_gradients import RunGradients
from icenet.parity.calls.runs import Draws, Targets, run_training
from icenet.parity.calls.sides import ModuleError, Side
from icenet.parity.causes.numbers import unequal_numbers
from icenet.parity.causes.search import suggest
from icenet.parity.inputs import Inputs
from icenet.parity.results import status as states
from icenet.parity.results import tree
from icenet.parity.results.result import Module, Report, Row, Stage
from icenet.parity.results.status import ALL_STAGES
from icenet.parity.stages import StageFailed, forward, gradients, structure, training, weights
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
        steps: Number of free-running training steps; default: 2, or 1 for more than a million parameters.
        seed: Seed of drawn inputs, cotangents and targets.
        draws: Number of random inputs, if none are given; default: 3.
        copy_weights: Whether to compare with the weights of `b` in a copy of `a`. False: with those that `a` has;
            unequal ones are a difference. None: they are copied if most of the weights of `a` have nothing in common
            with those of `b`, because they are still the initial ones; the first line of the report says so.
        replay: Where to save the smallest input that differs; default: it is not searched for.

    Returns:
        The report.

    Raises:
        UsageError: An argument is not a module, an option is wrong, or `b` fails on the inputs.
    """
    stages = check_options(stages, dtype, inputs, draws, steps, seed)
    check_pairs(rename, loss, optimizer, copy_weights)
    options = {"rename": rename, "layout": layout, "loss": loss, "optimizer": optimizer, "copy_weights": copy_weights}
    if hasattr(b, "judge"):  # a recorded trace
        if inputs is not None or layout is not None or draws is not None or replay is not None:
            raise UsageError("compare: a trace has its inputs; give no inputs, layout, draws or replay")
        found: Report = b.judge(a, stages, dtype, steps, options)
        return found
    with _host_generators_kept():
        comparison = Comparison(a, b, stages, dtype, seed, steps, options)
        given = comparison.drawn(draws or 3) if inputs is None else [drawing.read(inputs, dtype)]
        report = comparison.run(given)
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


class Comparison:
    """The state of one comparison, and the order of its stages.

    Args:
        a, b, stages, dtype, seed, steps: See `compare`.
        options: `rename`, `layout`, `loss`, `optimizer` and `copy_weights` of `compare`.

    Attributes:
        report: The result.
        stages: The stages of the report by name.
        a, b, reference: The sides: `a`, `b` in the dtype under test, and `b` in float64.
        matches: The modules that correspond.
        opaque: Paths in `b` of layers of both frameworks that are compared as one layer.
        different: Paths in `b` of layers whose parameters differ between the frameworks.
        parameter_names: The name in `b` of each array of `a` that both sides have.
        modules: The modules of the report by path.
        inputs_a, inputs_b: The inputs of the current draw, in the axes of each side.
        targets_a, targets_b: The targets of the default loss.
        trains: Whether gradients are computed in training mode.
        first_runs: The loss and the gradients of each side on the first inputs.
        gradients: Those of the reference.
        ties: Paths of the modules whose gradients differ only at ties.
        own_errors: Relative errors of each module on equal inputs, by path: of its output, gradient and parameters.
        factor: How much less exact the sums of `a` are than those of `b`, as far as it is known.
        loss_noise: The noise of the loss.
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
        self.report = Report(dtype=dtype, seed=seed)
        self.stages = {name: Stage(name, states.NOT_RUN if name in stages else states.SKIPPED) for name in ALL_STAGES}
        self.report.stages = list(self.stages.values())
        self.dtype, self.seed, self.steps, self.options = dtype, seed, steps, options
        kinds = backends.backend_of(a), self.backend_of_reference(b)
        self.losses, self.optimizers = options["loss"], options["optimizer"]
        self.gradients: dict[str, Array] = {}
        self.inputs_a = Inputs(((), {}), [])
        self.inputs_b: list[Value] = []
        self.trains = True
        self.loss_noise = 0.0
        self.own_errors: dict[str, dict[str, float]] = {}
        self.parameter_names: dict[str, str] = {}
        self.different: set[str] = set()
        self.ties: set[str] = set()
        self.first_runs: list[tuple[float, Mapping[str, Value]] | None] = [None, None, None]
        self.targets_a = self.targets_b = Targets(seed, None)
        if kinds == ("torch", "mlx"):
            a, b = b, a
            self.losses, self.optimizers = (pair and pair[::-1] for pair in (self.losses, self.optimizers))
            self.report.notes.append(
                "a and b are exchanged: PyTorch is the reference, because it computes in float64"
            )
        self.report.names = type(a).__name__, type(b).__name__
        self.user_a, self.user_b = a, b
        self.a = Side(a, dtype).as_test()
        is_mlx = kinds[1] == "mlx"
        self.b, self.reference = self.sides_of_reference(b)
        if is_mlx:
            self.report.notes.append(
                "the noise is that of b with its values moved by an ulp, because MLX has no float64"
            )
        self.matches = match_modules(self.a, self.b, options["rename"])
        self.a.names = {match.a: match.b for match in self.matches if match.a is not None and match.b is not None}
        to_a = {match.b: match.a for match in self.matches if match.a is not None and match.b is not None}
        self.opaque = set(opaque_layers(self.a, self.b, to_a))
        for path in self.opaque | {p for p in to_a if self.b.kinds.get(p) in align.DIFFERENT_CALLS}:
            sides = ((self.a, to_a[path]), (self.b, path), (self.reference, path))
            changed = [side.silence(own) for side, own in sides]
            if any(changed):
                self.report.notes.append(f"the dropout within {path} is left out: its masks have no counterpart")
        for role, side, given in zip("ab", (self.a, self.b), self.optimizers or (), strict=False):
            side.check_optimizer(given, role)
        for role, side in (("a", self.a), ("b", self.b), ("reference", self.reference)):
            self.report.environment[role] = self.describe(side)
            side.has_one_bias = self.a.backend != self.b.backend
        self.store = Store()
        self.factor = 1.0
        self.modules: dict[str, Module] = {}
        tree.add_modules(self)

    computes_reference = True
    """Whether the reference can compute something else, to find a cause."""
    judges_ties = True
    """Whether layers are computed again with equal inputs moved apart."""

    # ---- the run --------------------------------------------------------------------------------------------

    def run(self, given: list[Inputs]) -> Report:
        """Runs the stages on each of the inputs and returns the report."""
        report = self.report
        report.inputs, report.draws = given[0].describe(), len(given)
        try:
            with self.a.eager(), self.b.eager(), np.errstate(all="ignore"):  # masks hold -inf
                for index, inputs in enumerate(given):
                    self._run_on(inputs, first=index == 0)
                    if index == 0:
                        of_first = self.inputs_a, self.inputs_b, self.targets_a, self.targets_b
                self.inputs_a, self.inputs_b, self.targets_a, self.targets_b = of_first
                if self.wants("optimizer") or self.wants("training"):
                    training.compare_training(self, given[0])
                self.add_notes(unequal_numbers(self))
        except StageFailed:
            pass
        except ModuleError as error:  # in training mode only
            stage = next(s for s in self.report.stages if s.status == states.NOT_RUN)
            path = self.a.names.get(error.path, error.path) if error.side is self.a else error.path
            note = f"{'a' if error.side is self.a else 'b'} raises an error in training mode: {error.reason}"
            stage.rows.append(Row(path, "call", status=states.DIFFERS, ratio=math.inf, note=note))
            self.fail(stage, path, note=note)
        finally:
            self.store.close()
        for stage in report.stages:
            if stage.rows and stage.status == states.NOT_RUN:
                stage.status = states.PASSED
        tree.finish_modules(self)
        return report

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
                found.append(inputs)
                break
            else:
                assert failure is not None
                taken = drawing.describe_signature(self.user_a)
                problem = f"b fails on drawn ones: {failure.reason}"
                raise UsageError(f"compare: {taken}: {problem}; pass inputs") from failure
        return found

    def wants(self, name: str) -> bool:
        """Returns whether a stage is to be run."""
        return self.stages[name].status != states.SKIPPED

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Measures the time of a stage; if it failed, no other is run."""
        stage = self.stages[name]
        start = time.perf_counter()
        try:
            yield stage
        finally:
            stage.seconds += time.perf_counter() - start
        if stage.status == states.FAILED:
            raise StageFailed
        if stage.status != states.SKIPPED:
            stage.status = states.PASSED

    def fail(self, stage: Stage, path: str, where: str = "", note: str = "") -> None:
        """Marks a stage as failed. The first call of a comparison names the culprit."""
        stage.status, stage.note = states.FAILED, note
        if self.report.culprit is None:
            self.report.culprit, self.report.where = path, where

    def _run_on(self, inputs: Inputs, first: bool) -> None:
        for side in (self.a, self.b, self.reference):
            side.loss_scale = 1.0
        with self.stage("structure") as stage:
            if first:
                structure.compare_parameters(self, stage)
            depends = self.a.depends_on_mode or self.b.depends_on_mode
            pairs, three = structure.compare_shapes(self, stage, inputs, train=not depends)
        if first:
            with self.stage("weights") as stage:
                weights.compare_weights(self, stage)
        if not any(map(self.wants, ("forward", "loss", "gradients"))):
            return
        with self.stage("forward") as stage:
            if first and forward.modes_differ(self, stage):
                return
            if depends:
                found = replays.replay_all(self, pairs)
                forward.judge_forward(self, stage, pairs, found, "")
                if stage.status == states.FAILED:
                    raise StageFailed
                try:
                    three = run_training(self, inputs, pairs)
                except Draws as error:
                    self.add_notes([f"{error} in training mode: gradients are compared in evaluation mode"])
                    self.trains = False
                    three = run_training(self, inputs, pairs)
                pairs, notes = pair_calls(self.a, self.b, three, self.matches)
                self.add_notes(notes)
            if self.wants("gradients"):
                pairs, three = runs.in_range(self, inputs, pairs, three)
            if first:
                self.first_runs = [
                    (float(np.asarray(run.loss.array)), run.gradients) if run.loss else None for run in three
                ]
                self.gradients = {name: np.asarray(item.array) for name, item in three[2].gradients.items()}
            backward = RunGradients(self, pairs, three) if self.wants("gradients") else None
            found = replays.replay_all(self, pairs, backward.undecided() if backward else ())
            forward.judge_forward(self, stage, pairs, found, "in training mode" if depends else "")
        with self.stage("loss") as stage:
            gradients.judge_loss(self, stage, pairs, three)
        with self.stage("gradients") as stage:
            gradients.judge_gradients(self, stage, backward, found)

    def set_mode(self, train: bool) -> None:
        """Sets the mode of all sides."""
        for side in (self.a, self.b, self.reference):
            side.set_mode(train)

    def add_notes(self, notes: Sequence[str]) -> None:
        """Adds remarks to the report, each once."""
        self.report.notes += [note for note in notes if note not in self.report.notes]

    def notes_of(self, path: str) -> list[str]:
        """Returns the list of remarks on a module."""
        module = self.modules.get(path)
        return module.notes if module is not None else self.report.notes

    # ---- what the reference provides, which may be a trace --------------------------------------------------

    def backend_of_reference(self, b: Any) -> str:
        """Returns "mlx" or "torch"."""
        return backends.backend_of(b)

    def sides_of_reference(self, b: Any) -> tuple[Side, Side]:
        """Returns `b` in the dtype under test, and the reference."""
        return Side(b, self.dtype, perturbed=backends.backend_of(b) == "mlx"), Side(b, self.dtype, exact=True)

    def describe(self, side: Side) -> dict[str, str]:
        """Returns framework, version, device and TF32 of a side."""
        return describe(side)

    def reference_run(self, inputs: Inputs, *arguments: Any) -> Run:
        """Returns the run of the reference, and sets the inputs in its axes."""
        return runs.reference_run(self, inputs, *arguments)

    def replay_of(self, pair: Pair, gradients: bool) -> Replay:
        """Returns the replay of a call: the inputs of the reference, rounded, and random cotangents."""
        values = [
            rounded(item, theirs.dtype) for item, theirs in zip(pair.inputs("b"), pair.inputs("noise"), strict=True)
        ]
        dtypes = [item.dtype for item in pair.results("noise")]
        return Replay(pair, values, cotangents_of(pair, dtypes, self.seed) if gradients else None)

    def b_replay(self, given: Replay) -> dict[str, Value]:
        """Returns a replay of `b` in the dtype under test."""
        if self.b.perturbation is not None:
            return self.b.sampled_replay(given, Sample(0, rounds=True))
        return self.b.replay(given)

    def propagated(self, exact: Mapping[str, Value]) -> dict[str, Array]:
        """Returns the error that values of the run have if every module is as far off as on equal inputs."""
        return runs.propagated(self, exact)

    def rate(self, names: Sequence[str], gradients: Mapping[str, Array]) -> float:
        """Returns the learning rate of the default optimizer."""
        return training.default_rate(names, self.reference.weights(), gradients)

    def suggest(self, pair: Pair, judgements: Mapping[str, Judgement]) -> None:
        """Sets the cause of the report, if a known one removes the difference."""
        if not self.options.get("suggest", True):
            return
        try:
            self.report.cause = suggest(self, pair, judgements)
        except Exception as error:  # the difference is found; only its cause is not
            self.report.notes.append(f"the search for a cause stopped: {type(error).__name__}: {error}")

    # ---- the smallest input ---------------------------------------------------------------------------------

    def shrink(self, path: str) -> None:
        """Finds the smallest input with which the same module differs, and saves it."""
        failed = self.report.failed_stage
        assert failed is not None
        if failed.name in ("weights", "optimizer", "training") or not hasattr(self, "inputs_a"):
            self.report.notes.append(
                f"no smaller input is searched for: the stage {failed.name} does not depend on it"
            )
            return
        stages = [stage.name for stage in self.report.stages if stage.status != states.SKIPPED]
        stages = stages[: stages.index(failed.name) + 1]
        options = {**self.options, "suggest": False, "loss": None if failed.name == "forward" else self.losses}

        def differs(inputs: Inputs) -> bool:
            other = Comparison(self.user_a, self.user_b, stages, self.dtype, self.seed, 0, options)
            try:
                report = other.run([inputs])
            except UsageError:  # b fails on it
                return False
            stage = report.failed_stage
            return stage is not None and (report.culprit, stage.name) == (self.report.culprit, failed.name)

        smallest = drawing.shrink(self.inputs_a, differs)
        self.report.replay = str(drawing.save(smallest, path))


def describe(side: Side) -> dict[str, str]:
    """Returns framework, version, device and TF32 of a side."""
    device = backends.module(side.backend, "tools.probe").device_of(side.module)
    name = str(getattr(device, "type", device)).rpartition(".")[2]
    described = backends.module(side.backend, "tools.environment").describe(name)
    uses = backends.module(side.backend, "nn.arithmetic").uses_tf32(device)
    dtype = "fp64" if side.exact else side.dtype
    return {**described, "dtype": dtype, "tf32": "on" if uses else "off"}
