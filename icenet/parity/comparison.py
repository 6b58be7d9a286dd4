"""Compares any two modules, of MLX, PyTorch or one of them, stage by stage: `icenet.parity.compare`."""

from __future__ import annotations

import contextlib
import math
import numbers
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.core.errors import UsageError
from icenet.core.models import modules
from icenet.core.weights.rename import Rename
from icenet.parity import align, causes
from icenet.parity import inputs as drawing
from icenet.parity import status as states
from icenet.parity.engines import Perturbation
from icenet.parity.events import Run, Store
from icenet.parity.inputs import Inputs
from icenet.parity.locate import judge_layer
from icenet.parity.pairing import first_mismatch, match_modules, opaque_layers, pair_calls, relative
from icenet.parity.result import Histogram, Module, Report, Row, Stage
from icenet.parity.sides import ModuleError, Pair, Side, cotangents_of, hidden, rounded
from icenet.parity.status import ALL_STAGES
from icenet.parity.trace import Call, Value
from icenet.parity.yardstick import (
    FACTOR,
    LIMITS,
    SAMPLES,
    Judgement,
    Samples,
    judge,
    judge_curve,
    judge_values,
    rms,
    squared_distance,
    sum_of_products,
)

Array = npt.NDArray[Any]
Losses = tuple[Callable[..., Any], Callable[..., Any]]

DTYPES = ("fp32", "bf16", "fp16")
SMALL = 1_000_000
"""Number of parameters up to which a comparison trains two steps by default, and one step above it."""
_ROUNDED = 1e-6
"""Largest relative difference of a buffer that both sides compute, such as a table of angles."""
_CORRECTION = 2.0**-24 / (1 - 0.999) / 2
"""Relative error of an update of Adam if its correction by 1 - 0.999 is rounded in fp32, as in MLX."""
_FEW = 4
"""Number of samples of the sums of a loss."""
_SAME = 0.1
"""Relative distance of a replay of the reference from its run at which the replay computes something else."""


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
    stages = _check(stages, dtype, inputs, draws, steps, seed)
    _check_pairs(rename, loss, optimizer, copy_weights)
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


def _check(
    stages: Sequence[str], dtype: str, inputs: Any, draws: int | None, steps: int | None, seed: int
) -> tuple[str, ...]:
    for name, value, least in (("draws", draws, 1), ("steps", steps, 0), ("seed", seed, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
            raise UsageError(f"compare: {name} is {value!r}; give a whole number, {least} or more")
    if not 0 <= seed < 2**32:
        raise UsageError(f"compare: seed is {seed}; give a whole number from 0 to 2**32 - 1")
    chosen = (stages,) if isinstance(stages, str) else tuple(stages)
    for name in chosen:
        if name not in ALL_STAGES:
            raise UsageError(f"compare: there is no stage {name!r}: the stages are {', '.join(ALL_STAGES)}")
    if not chosen:
        raise UsageError(f"compare: no stage is given: the stages are {', '.join(ALL_STAGES)}")
    if dtype not in DTYPES:
        raise UsageError(f"compare: dtype is {dtype!r}: give one of {', '.join(DTYPES)}")
    if draws is not None and (inputs is not None or draws < 1):
        why = "inputs are given, so none are drawn" if inputs is not None else f"draws is {draws}"
        raise UsageError(f"compare: {why}; draws is the number of random inputs, 1 or more, without inputs")
    if steps is not None and steps < 0:
        raise UsageError(f"compare: steps is {steps}; give 0 or more")
    return tuple(name for name in ALL_STAGES if name in chosen)


def _check_pairs(rename: Any, loss: Any, optimizer: Any, copy_weights: Any) -> None:
    if rename is not None and not isinstance(rename, Mapping) and not callable(rename):
        raise UsageError(f"compare: rename is {rename!r}; give a dict of names, or a function of a name")
    if copy_weights not in (None, True, False):
        raise UsageError(f"compare: copy_weights is {copy_weights!r}; give True, False or None")
    for name, value, what in (
        ("loss", loss, "two functions of the output, (that of a, that of b)"),
        ("optimizer", optimizer, "two optimizers, (that of a, that of b)"),
    ):
        if value is not None and not (isinstance(value, (tuple, list)) and len(value) == 2):
            raise UsageError(f"compare: {name} is {_kind(value)}; give {what}")
    for item in loss or ():
        if item is not None and not callable(item):
            raise UsageError(f"compare: loss has {_kind(item)}; give two functions of the output")


def _kind(value: Any) -> str:
    """Returns what to call a value in a message."""
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"a {type(value).__name__}"


@contextlib.contextmanager
def _host_generators_kept() -> Iterator[None]:
    """Restores the generators of Python and numpy on exit."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class _Origin(NamedTuple):
    """Where a difference begins in a replay.

    Attributes:
        order: Position in the order of the computation.
        where: Where in the module, such as "between mlp and norm2"; empty for a layer without others within.
        label: What to call the result that differs.
        name: Its name in the replay.
        judgement: Its judgement.
    """

    order: float
    where: str
    label: str
    name: str
    judgement: Judgement


class _Draws(Exception):
    """A module draws random numbers without a key, so that its runs cannot be compared."""


class _Stop(Exception):
    """A stage failed."""


class Comparison:
    """The state of one comparison."""

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
        self._trains = True
        self.loss_noise = 0.0
        self.own_errors: dict[str, dict[str, float]] = {}
        """The relative error of each module on equal inputs, by path: of its output, its gradient, its parameters."""
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
        """How much less exact the sums of `a` are than those of `b`, as far as it is known."""
        self._modules: dict[str, Module] = {}
        self._add_modules()

    computes_reference = True
    """Whether the reference can compute something else, to find a cause."""
    judges_ties = True
    """Whether layers are computed again with equal inputs moved apart."""

    def backend_of_reference(self, b: Any) -> str:
        """Returns "mlx" or "torch"."""
        return backends.backend_of(b)

    def sides_of_reference(self, b: Any) -> tuple[Side, Side]:
        """Returns `b` in the dtype under test, and the reference."""
        return Side(b, self.dtype, perturbed=backends.backend_of(b) == "mlx"), Side(b, self.dtype, exact=True)

    def describe(self, side: Side) -> dict[str, str]:
        """Returns framework, version, device and TF32 of a side."""
        return describe(side)

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
                if self._wants("optimizer") or self._wants("training"):
                    self._train(given[0])
                self._add_notes(causes.unequal_numbers(self))
        except _Stop:
            pass
        except ModuleError as error:  # in training mode only
            stage = next(s for s in self.report.stages if s.status == states.NOT_RUN)
            path = self.a.names.get(error.path, error.path) if error.side is self.a else error.path
            note = f"{'a' if error.side is self.a else 'b'} raises an error in training mode: {error.reason}"
            stage.rows.append(Row(path, "call", status=states.DIFFERS, ratio=math.inf, note=note))
            self._fail(stage, path, note=note)
        finally:
            self.store.close()
        for stage in report.stages:
            if stage.rows and stage.status == states.NOT_RUN:
                stage.status = states.PASSED
        self._finish_modules()
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
                self._set_mode(False)
                try:
                    self._reference_run(inputs)
                except ModuleError as error:
                    failure = failure or error
                    continue
                found.append(inputs)
                break
            else:
                assert failure is not None
                name = self.report.names[1]
                raise UsageError(f"compare: {name} fails on drawn inputs: {failure.reason}; pass inputs") from failure
        return found

    def _wants(self, name: str) -> bool:
        return self.stages[name].status != states.SKIPPED

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[Stage]:
        """Measures the time of a stage; if it failed, no other is run."""
        stage = self.stages[name]
        start = time.perf_counter()
        try:
            yield stage
        finally:
            stage.seconds += time.perf_counter() - start
        if stage.status == states.FAILED:
            raise _Stop
        if stage.status != states.SKIPPED:
            stage.status = states.PASSED

    def _fail(self, stage: Stage, path: str, where: str = "", note: str = "") -> None:
        stage.status, stage.note = states.FAILED, note
        if self.report.culprit is None:
            self.report.culprit, self.report.where = path, where

    def _run_on(self, inputs: Inputs, first: bool) -> None:
        with self._stage("structure") as stage:
            if first:
                self._compare_parameters(stage)
            depends = self._depends_on_mode()
            pairs, runs = self._shapes(stage, inputs, train=not depends)
        if first:
            with self._stage("weights") as stage:
                self._compare_weights(stage)
        if not any(map(self._wants, ("forward", "loss", "gradients"))):
            return
        with self._stage("forward") as stage:
            if first and self._modes_differ(stage):
                return
            if depends:
                found = self._replay_all(pairs, gradients=False)
                self._judge_forward(stage, pairs, found, "")
                if stage.status == states.FAILED:
                    raise _Stop
                try:
                    runs = self._run_training(inputs, pairs)
                except _Draws as error:
                    self._add_notes([f"{error} in training mode: gradients are compared in evaluation mode"])
                    self._trains = False
                    runs = self._run_training(inputs, pairs)
                pairs, notes = pair_calls(self.a, self.b, runs, self.matches)
                self._add_notes(notes)
            if first:
                self.first_runs = [
                    (float(np.asarray(run.loss.array)), run.gradients) if run.loss else None for run in runs
                ]
                self.gradients = {name: np.asarray(item.array) for name, item in runs[2].gradients.items()}
            found = self._replay_all(pairs, gradients=self._wants("gradients"))
            self._judge_forward(stage, pairs, found, "in training mode" if depends else "")
        with self._stage("loss") as stage:
            self._judge_loss(stage, pairs, runs)
        with self._stage("gradients") as stage:
            self._judge_gradients(stage, pairs, runs, found)

    # ---- structure and weights ------------------------------------------------------------------------------

    def _add_modules(self) -> None:
        parents: list[str] = []
        back = {theirs: ours for ours, theirs in self.a.names.items()}
        inner_b = tuple(f"{path}." for path in self.opaque)
        opaque = tuple(f"{back[path]}." for path in self.opaque), inner_b
        for match in self.matches:
            path = match.b if match.b is not None else match.a
            assert path is not None
            sides = ((self.a, match.a), (self.b, match.b))
            if any(p is not None and p.startswith(inner) for (_, p), inner in zip(sides, opaque, strict=True)):
                continue  # part of a layer that is compared as one
            if (match.a is None or match.b is None) and all(
                p is None or _is_list(side.classes[p]) for side, p in sides
            ):
                continue  # a list of modules, which computes nothing
            classes = [side.classes[p].rpartition(".")[2] if p is not None else "" for side, p in sides]
            module = Module(path, match.a, match.b, classes[0], classes[1])
            if match.note:
                module.notes.append(match.note)
            if match.a is None or match.b is None:
                module.status = states.SKIPPED
                module.notes.append(f"exists in {'b' if match.a is None else 'a'} only")
            if path in self._modules:
                continue
            self._modules[path] = module
            parents.append(path)
        for path in parents:
            if path:
                parent = path.rpartition(".")[0]
                while parent not in self._modules:
                    parent = parent.rpartition(".")[0]
                self._modules[parent].children.append(path)
        order: list[Module] = []

        def visit(path: str) -> None:
            order.append(self._modules[path])
            for child in self._modules[path].children:
                visit(child)

        visit("")
        self.report.modules = order

    def _parameters(self) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
        """Returns the names of the arrays that both sides have, `a` to `b`, and those that one of them lacks.

        The latter are (path in `b`, name, side that has it).
        """
        shapes_a, shapes_b = self.a.shapes, self.b.shapes
        different = {
            match.b
            for match in self.matches
            if match.a is not None
            and match.b is not None
            and self.b.kinds.get(match.b) in align.DIFFERENT_CALLS
            and self.a.kinds.get(match.a) == self.b.kinds.get(match.b)
        } | self.opaque
        self.different = {path for path in different if path is not None}
        to_b = self.a.names
        to_a = set(to_b.values())
        names: dict[str, str] = {}
        one_sided: list[tuple[str, str, str]] = []
        for name in shapes_a:
            holder, rest = _split_at(name, self.a.modules)
            if holder not in to_b or _within(to_b[holder], different):
                continue
            other = f"{to_b[holder]}.{rest}" if to_b[holder] else rest
            if other in shapes_b:
                names[name] = other
            else:
                one_sided.append((to_b[holder], rest, "a"))
        taken = set(names.values())
        for name in shapes_b:
            holder, rest = _split_at(name, self.b.modules)
            if name not in taken and holder in to_a and not _within(holder, different):
                one_sided.append((holder, rest, "b"))
        return names, one_sided

    def _compare_parameters(self, stage: Stage) -> None:
        self.parameter_names, one_sided = self._parameters()
        trained = {"a": self.a.trainable_names, "b": self.b.trainable_names}
        for path, name, side in one_sided:
            whole = f"{path}.{name}" if path else name
            own = whole
            if side == "a":
                back = {theirs: ours for ours, theirs in self.a.names.items()}
                own = f"{back[path]}.{name}" if back[path] else name
            if own not in trained[side]:
                self.report.notes.append(f"{whole}: a buffer of {side} only")
                continue
            note = f"the parameter {name} exists in {side} only"
            stage.rows.append(Row(path, name, status=states.DIFFERS, ratio=math.inf, note=note))
            self._fail(stage, path, note=note)
        for ours, theirs in self.parameter_names.items():
            path, name = _split_at(theirs, self.b.modules)
            shapes = self.a.shapes[ours], self.b.shapes[theirs]
            status, note = states.PASSED, ""
            if shapes[0] != shapes[1]:
                status, note = states.DIFFERS, f"{name} is {list(shapes[0])} in a, {list(shapes[1])} in b"
                self._fail(stage, path, note=note)
            stage.rows.append(Row(path, name, shapes[1], status, math.inf if note else 0.0, note=note))
        if stage.status == states.FAILED:
            raise _Stop
        copies = self.options["copy_weights"]
        if copies is None and self._were_never_copied():
            copies, self.report.copied_weights = True, True
        if copies and self.different and (self.a.backend, self.b.backend) == ("mlx", "torch"):
            back = {theirs: ours for ours, theirs in self.a.names.items()}
            self.a.unshare()
            for path in self.different:
                modules.from_torch(self.b.modules[path], self.a.modules[back[path]])
        if copies:
            values = self.b.weights()
            self.a.assign({ours: values[theirs] for ours, theirs in self.parameter_names.items()})
            self.report.notes.append(
                "the weights were not equal: those of b were used in a copy of a; icenet.from_torch copies them, "
                "copy_weights=False compares with those that a has"
                if self.report.copied_weights
                else "the weights of b are copied into a"
            )

    def _were_never_copied(self) -> bool:
        """Returns whether most weights with random initial values are unrelated on both sides."""
        ours, theirs = self.a.weights(), self.b.weights()
        pairs = [(ours[own], theirs[other]) for own, other in self.parameter_names.items()]
        pairs += [(own, other) for _, _, own, other in self._converted_weights()]
        related = [_are_related(x, y) for x, y in pairs if x.size > 1 and _varies(x) and _varies(y)]
        return 2 * sum(related) < len(related)

    def _compare_weights(self, stage: Stage) -> None:
        ours, theirs = self.a.weights(), self.b.weights()
        pairs = [
            (*_split_at(other, self.b.modules), ours[name], theirs[other])
            for name, other in self.parameter_names.items()
        ]
        cause = ""
        for path, part, own, reference in [*pairs, *self._converted_weights()]:
            x, y = np.asarray(own, np.float64), np.asarray(reference, np.float64)
            other = f"{path}.{part}" if path else part
            status, note, ratio = states.PASSED, "", 0.0
            if not np.array_equal(x, y, equal_nan=True):
                distance = rms(x - y) / (rms(y) or 1.0)
                is_buffer = other not in self.b.trainable_names
                if is_buffer and distance <= _ROUNDED:
                    status, note = states.LESS_EXACT, "equal but for rounding"
                else:
                    how = align.permutation(x, y) or _halves(x, y)
                    detail = (
                        how.replace("PyTorch's", "that of b") if how else f"by {states.number(distance)} of its size"
                    )
                    status, note, ratio = states.DIFFERS, f"{part} differs {detail}", math.inf
                    cause = cause or (f"{part} of a differs {detail}" if how else "")
            histogram = _histogram(x, y) if status == states.DIFFERS else None
            stage.rows.append(
                Row(path, part, y.shape, status, ratio, rms(x - y), 0.0, rms(y), note=note, histogram=histogram)
            )
        bad = [row for row in stage.rows if not row.passed]
        if bad:
            note = bad[0].note
            self.report.cause = cause
            if self.options["copy_weights"] is False and self._were_never_copied():
                count = f"{len(bad)} of {len(stage.rows)} arrays differ"
                note = f"{count}: copy them first, with icenet.from_torch, or pass copy_weights=True"
                self.report.cause = f"the weights were never copied: {note}"
            self._fail(stage, bad[0].path, note=note)

    def _converted_weights(self) -> list[tuple[str, str, Array, Array]]:
        """Returns the arrays of layers whose parameters differ between the frameworks: path, name, of `a`, of `b`.

        The arrays of `a` are converted to PyTorch's. Biases that are added are compared as their sum.
        """
        found = []
        module = getattr(self.b, "module", None)
        if (self.a.backend, self.b.backend) != ("mlx", "torch") or module is None:
            return []
        back = {theirs: ours for ours, theirs in self.a.names.items()}
        for path in sorted(self.different):
            if any(path.startswith(f"{other}.") for other in self.different):
                continue
            layers = self.a.modules[back[path]], self.b.modules[path]
            pairing = modules.pair(*layers)
            if pairing.problems:
                self._add_notes([f"{path}: its weights are not compared: {pairing.problems[0]}"])
                continue
            own, reference = pairing.to_torch(modules.get_weights(layers[0])), modules.get_weights(layers[1])
            for name, array in reference.items():
                summed = name.replace("bias_hh", "bias_ih")
                if name not in own or (summed != name and summed in own):
                    continue
                ours, theirs = own[name], array
                if (other := name.replace("bias_ih", "bias_hh")) != name and other in own:
                    ours, theirs = ours + own[other], theirs + reference[other]
                found.append((path, name, ours, theirs))
        return found

    # ---- runs -----------------------------------------------------------------------------------------------

    def _shapes(self, stage: Stage, inputs: Inputs, train: bool) -> tuple[list[Pair], tuple[Run, Run, Run]]:
        """Runs all sides and compares the shapes of all arguments and outputs.

        Args:
            stage, inputs: The stage and the inputs.
            train: Whether to compute the loss and its gradients at once: the module does the same in both modes.
        """
        self.inputs_a = inputs
        self._set_mode(False)
        failure: ModuleError | None = None
        try:
            if train:
                with contextlib.suppress(_AmbiguousAxes, ModuleError, _Draws):
                    runs = self._run_training(inputs, [])
                    return self._paired(stage, runs, None)
                self._set_mode(False)
            exact = self._reference_run(inputs)
        except ModuleError as error:
            raise UsageError(
                f"compare: b ({self.report.names[1]}) fails on the inputs, in {error.path or 'the model itself'}: "
                f"{error.reason}; give inputs that it accepts, or layout="
            ) from error
        try:
            own = self.a.record(inputs.given, inputs.values, self.store)
        except ModuleError as error:
            failure, own = error, error.run
        noise = self.b.record(inputs.given, self.inputs_b, self.store)
        try:
            self._check_draws(inputs)
        except _Draws as error:
            raise UsageError(
                f"compare: {error} in evaluation mode, so no two runs are equal; give it a key"
            ) from None
        pairs, runs = self._paired(stage, (own, noise, exact), failure)
        return (pairs, self._run_training(inputs, pairs)) if train else (pairs, runs)

    def _set_mode(self, train: bool) -> None:
        for side in (self.a, self.b, self.reference):
            side.set_mode(train)

    def _paired(
        self, stage: Stage, runs: tuple[Run, Run, Run], failure: ModuleError | None
    ) -> tuple[list[Pair], tuple[Run, Run, Run]]:
        """Returns the calls of both sides, if the shapes of their arrays correspond and `a` did not fail."""
        pairs, notes = pair_calls(self.a, self.b, runs, self.matches)
        self._add_notes(notes)
        if mismatch := first_mismatch(pairs):
            self._fail(stage, mismatch.path, mismatch.where, mismatch.note)
            row = Row(mismatch.path, "shape", status=states.DIFFERS, ratio=math.inf, note=mismatch.note)
            stage.rows.append(replace(row, where=mismatch.where))
            raise _Stop
        if failure is not None:
            path = self.a.names.get(failure.path, failure.path)
            note = f"a raises an error: {failure.reason}"
            stage.rows.append(Row(path, "call", status=states.DIFFERS, ratio=math.inf, note=note))
            self._fail(stage, path, note=note)
            raise _Stop
        if not pairs[0].outputs:
            raise UsageError(
                f"compare: {self.report.names[1]} returns nothing that can be compared; return tensors, or tuples, "
                "lists, dicts or dataclasses of them"
            )
        for pair in pairs:  # the masks of a dropout depend on the axes of its input
            how = pair.arguments[0][2] if pair.arguments else align.SAME
            for side in (self.b, self.reference):
                side.set_channels(pair.path, how == align.MOVED)
            if self.a.backend == self.b.backend and self.computes_reference:
                self.a.set_channels(pair.a.path, how == align.MOVED)
        return pairs, runs

    def _reference_run(self, inputs: Inputs, *arguments: Any) -> Run:
        """Returns the run of the reference, and sets the inputs in its axes."""
        same = self.a.backend == self.b.backend
        candidates = [drawing.for_reference(inputs, self.b, self.options["layout"], same)]
        if self.options["layout"] is None and not same:
            for how in (align.SAME, align.MOVED):
                other = drawing.moved(inputs, how)
                if [v.array.shape for v in other] not in [[v.array.shape for v in known] for known in candidates]:
                    candidates.append(other)
        failures: list[ModuleError] = []
        for values in candidates:
            try:
                run = self.reference.record(inputs.given, values, self.store, *arguments)
                self.inputs_b = values
                return run
            except ModuleError as error:
                failures.append(error)
        raise failures[0]

    def _run_training(self, inputs: Inputs, pairs: list[Pair]) -> tuple[Run, Run, Run]:
        """Runs all sides in training mode with the loss and its gradients.

        Raises:
            _AmbiguousAxes: The axes of the outputs of `a` are not known, because there are no pairs.
        """
        self._set_mode(self._trains)
        loss_a, loss_b = self.losses or (None, None)
        wants = any(map(self._wants, ("loss", "gradients", "optimizer", "training")))
        self.targets_b = Targets(self.seed, self.reference.tools)
        exact = self._reference_run(inputs, loss_b, self.targets_b, wants)
        noise = self.b.record(inputs.given, self.inputs_b, self.store, loss_b, self.targets_b, wants)
        hows = {i: how for i, _, how in pairs[0].outputs} if pairs else None
        self.targets_a = self.targets_b.on(self.a.tools, hows, self.a.backend == self.b.backend)
        own = self.a.record(inputs.given, inputs.values, self.store, loss_a, self.targets_a, wants)
        self._check_draws(inputs)
        return own, noise, exact

    def _check_draws(self, inputs: Inputs) -> None:
        """Raises _Draws if a module draws random numbers without a key in the last run."""
        for side, values in ((self.a, inputs.values), (self.b, self.inputs_b)):
            if side.drew:
                path = side.drawing_module(inputs.given, values)
                name = side.names.get(path, path) if path else "the model"
                raise _Draws(f"{name} of {'a' if side is self.a else 'b'} draws random numbers without a key")

    def _add_notes(self, notes: Sequence[str]) -> None:
        self.report.notes += [note for note in notes if note not in self.report.notes]

    def _depends_on_mode(self) -> bool:
        return self.a.depends_on_mode or self.b.depends_on_mode

    def _modes_differ(self, stage: Stage) -> bool:
        """Compares the modes of the modules that compute something else in training mode, as the user gave them."""
        for ours, theirs in self.a.names.items():
            flags = self.a.mode(ours), self.b.mode(theirs)
            if flags[0] == flags[1] or not (self.a.depends_on_mode_at(ours) and self.b.depends_on_mode_at(theirs)):
                continue
            names = ["training" if flag else "evaluation" for flag in flags]
            note = f"it is in {names[0]} mode in a, in {names[1]} mode in b"
            stage.rows.append(Row(theirs, "mode", status=states.DIFFERS, ratio=math.inf, note=note))
        if stage.rows:
            row = stage.rows[0]
            self.report.cause = "the mode: call train() or eval() of both modules"
            self._fail(stage, row.path, note=row.note)
        return bool(stage.rows)

    # ---- replays --------------------------------------------------------------------------------------------

    def _replay_all(self, pairs: list[Pair], gradients: bool) -> dict[int, dict[str, Judgement]]:
        """Returns the judgements of the replay of each call by the number of its event in `b`."""
        found = {}
        self.ties: set[str] = set()
        for pair in pairs:
            if not pair.obstacle:
                found[pair.b.number] = self._replay(pair, gradients)
        return found

    def replay_inputs(self, pair: Pair, gradients: bool) -> tuple[list[Value], list[Value] | None]:
        """Returns the inputs of a replay: those of the reference, rounded, and random cotangents."""
        values = [
            rounded(item, theirs.dtype) for item, theirs in zip(pair.inputs("b"), pair.inputs("noise"), strict=True)
        ]
        dtypes = [item.dtype for item in pair.results("noise")]
        return values, cotangents_of(pair, dtypes, self.seed) if gradients else None

    def b_replay(self, pair: Pair, values: Sequence[Value], seeds: Sequence[Value] | None) -> dict[str, Value]:
        """Returns a replay of `b` in the dtype under test."""
        if self.b.perturbation is not None:
            return self.b.sampled_replay(pair, 0, values, seeds, rounds=True)
        return self.b.replay(pair, values, seeds)

    def _replay(self, pair: Pair, gradients: bool) -> dict[str, Judgement]:
        values, seeds = self.replay_inputs(pair, gradients)
        pair.parameters = self.reference.parameters_within(pair.path) if gradients else []
        try:
            exact = self.reference.replay(pair, values, seeds)
            if pair.children and not _is_same(exact, pair.results("b")):
                raise align.ReplayError("computes something else")
        except align.ReplayError as error:
            if not pair.children:
                pair.obstacle = f"not replayed: b {error}"
                return {}
            pair.children = []  # its calls cannot be left out, because they have other effects
            return self._replay(pair, gradients)
        pair.parameters = [
            name for name in pair.parameters if f"gradient {name}" in exact and self.a.has_parameter(pair, name)
        ]
        replays = _Replays(self, pair, (values, seeds, exact))
        samples = replays.samples()
        judgements, has_ties = judge_layer(
            pair.key,
            Call(tuple(values)),
            seeds,
            (replays, replays.noise, replays.exact),  # type: ignore[arg-type]
            self.dtype,
            samples,
            pair.is_leaf,
            quick=lambda name: _bias_noise(pair, name, seeds),
            ties=self.judges_ties,
        )
        if has_ties:
            self.ties.add(pair.path)
        own = self.own_errors.setdefault(pair.path, {})
        for name, judgement in judgements.items():
            value = exact.get(name.replace("gradient:", "gradient ", 1))
            what = "output" if name.startswith("output") else "gradient" if name.startswith("input") else name
            if value is not None and math.isfinite(judgement.error):
                size = rms(value.array)
                own[what] = max(own.get(what, 0.0), max(judgement.error, judgement.noise) / size if size else 0.0)
            if judgement.passed and judgement.plain_ratio:
                self.factor = max(self.factor, judgement.plain_ratio / FACTOR)
        return judgements

    # ---- forward --------------------------------------------------------------------------------------------

    def _judge_forward(
        self, stage: Stage, pairs: list[Pair], found: dict[int, dict[str, Judgement]], note: str
    ) -> None:
        candidates = ((pair, self._first_output(pair, found.get(pair.b.number, {}))) for pair in pairs)
        origins = sorted(
            ((pair, origin) for pair, origin in candidates if origin is not None), key=lambda item: item[1].order
        )
        differing = {pair.path for pair, _ in origins}
        first = origins[0][1].order if origins else math.inf
        places = {id(pair): origin for pair, origin in origins}
        for pair in pairs:
            own = {n: j for n, j in found.get(pair.b.number, {}).items() if n.startswith(("output", "statistic"))}
            worst = max(own.values(), key=lambda judgement: judgement.ratio, default=None)
            for i, j, how in pair.outputs:
                if pair.b.outputs[j].is_float:
                    stage.rows.append(self._output_row(pair, (i, j, how), worst, places, differing, first, note))
            if pair.obstacle and pair.obstacle not in self._notes(pair.path):
                self._notes(pair.path).append(pair.obstacle)
        if origins:
            pair, origin = origins[0]
            self._fail(stage, pair.path, origin.where, _neutral(origin.judgement.note) or note)
            self._suggest(pair, found[pair.b.number])
            return
        # every module agrees on equal inputs; the run as a whole may be off only by what the modules are
        root = [row for row in stage.rows if row.path == "" and row.part.startswith("output")]
        for row in root:
            if row.ratio > FACTOR * self.factor and not row.note and not self._agrees_in_samples(pairs, row):
                index = stage.rows.index(row)
                stage.rows[index] = replace(row, status=states.DIFFERS)
                self._fail(
                    stage, "", "", "the run differs, although every module agrees on the inputs of the reference"
                )

    def _notes(self, path: str) -> list[str]:
        module = self._modules.get(path)
        return module.notes if module is not None else self.report.notes

    def _output_row(
        self,
        pair: Pair,
        arrays: tuple[int, int, str],
        worst: Judgement | None,
        places: Mapping[int, _Origin],
        differing: set[str],
        first: float,
        note: str,
    ) -> Row:
        i, j, how = arrays
        ours = align.to_torch(how, pair.a.outputs[i].array)
        theirs, exact = pair.noise.outputs[j], pair.b.outputs[j]
        if j in pair.masked_outputs:
            ours, theirs, exact = hidden(Value(ours, theirs.dtype)).array, hidden(theirs), hidden(exact)
        judged = judge(ours, theirs.array, exact.array, self.dtype, stored=theirs.dtype)
        is_over = not judged.passed
        status, where, part = states.PASSED, "", "output" + (f"[{j}]" if j else "")
        if id(pair) in places:
            status, where, own_part = states.DIFFERS, places[id(pair)].where, places[id(pair)].label
        elif any(path != pair.path and _is_in(path, pair.path) for path in differing):
            status, own_part = states.CONTAINS, ""
        elif is_over and pair.b.number > first:
            status, own_part = states.INHERITS, ""
        else:
            own_part = ""
            if is_over or (worst is not None and worst.plain_ratio):
                status = states.LESS_EXACT
        remarks = filter(None, (note, judged.note, worst.note if worst is not None else "", pair.obstacle))
        ratio = judged.ratio if worst is None else max(judged.ratio, worst.ratio)
        return Row(
            pair.path,
            part,
            exact.array.shape,
            status,
            ratio,
            judged.error,
            judged.noise,
            rms(exact.array),
            worst.ratio if worst is not None else None,
            own_part,
            where,
            _neutral("; ".join(dict.fromkeys(remarks))),
            pair.b.call,
            pair.b.number,
            _histogram(ours, exact.array) if status == states.DIFFERS else None,
        )

    def _first_output(self, pair: Pair, judgements: Mapping[str, Judgement]) -> _Origin | None:
        """Returns where in a replay a difference begins, in the order of the computation."""
        places = pair.places()
        found = []
        last = max((event.number for event in pair.b.walk()), default=pair.b.number)
        for name, judgement in judgements.items():
            if judgement.passed:
                continue
            if name.startswith("statistic "):
                found.append(_Origin(last + 0.6, "", name, name, judgement))
            elif name.startswith("output"):
                child, number = places[_index(name)]
                if child is None:
                    where = f"after {relative(pair.children[-1].path, pair.path)}" if pair.children else ""
                    label = "output" + (f"[{number}]" if number else "")
                    found.append(_Origin(last + 0.5, where, label, name, judgement))
                else:
                    label = f"input of {relative(child.path, pair.path)}"
                    found.append(_Origin(child.b.number - 0.5, self._between(pair, child), label, name, judgement))
        return min(found, key=lambda origin: origin.order, default=None)

    def first_name(self, pair: Pair, judgements: Mapping[str, Judgement]) -> str:
        """Returns the name of the result of a replay in which a difference begins."""
        origin = self._first_output(pair, judgements) or self._first_gradient(pair, judgements)
        return origin.name if origin is not None else "output"

    def _between(self, pair: Pair, child: Pair) -> str:
        """Returns `between mlp and norm2`, given a call within a module."""
        index = pair.children.index(child)
        name = relative(child.path, pair.path)
        if index == 0:
            return f"before {name}"
        return f"between {relative(pair.children[index - 1].path, pair.path)} and {name}"

    # ---- loss and gradients ---------------------------------------------------------------------------------

    def _judge_loss(self, stage: Stage, pairs: list[Pair], runs: tuple[Run, Run, Run]) -> None:
        if stage.status == states.SKIPPED or runs[2].loss is None:
            return
        root = pairs[0]
        values = [
            rounded(item, theirs.dtype) for item, theirs in zip(root.b.outputs, root.noise.outputs, strict=True)
        ]
        self.loss_noise = _loss_noise(root)
        losses = []
        hows = {j: (i, how) for i, j, how in root.outputs}
        for side, event in ((self.a, root.a), (self.b, root.noise), (self.reference, root.b)):
            given = list(values)
            if side is self.a:
                given = list(event.outputs)
                for j, (i, how) in hows.items():
                    given[i] = Value(align.to_mlx(how, values[j].array), values[j].dtype)
            function = (self.losses or (None, None))[0 if side is self.a else 1]
            losses.append(side.loss_of(event, given, function, self.targets_a if side is self.a else self.targets_b))
        ours, theirs, exact = losses
        judged = {}
        for name in exact:
            if name in ours and name in theirs:
                x, y = ours[name], theirs[name]
                if name != "loss" and _index(name) in hows:
                    x = Value(align.to_torch(hows[_index(name)][1], x.array), x.dtype)
                floor = 2.0**-24 * abs(float(exact["loss"].array)) if name == "loss" else 0.0
                judged[name] = judge(x.array, y.array, exact[name].array, "fp32", min_noise=floor)
        if any(not item.passed for item in judged.values()):
            judged |= self._loss_in_order(root, values, ours, exact, judged)
        worst = max(judged.items(), key=lambda item: item[1].ratio)
        run = [float(np.asarray(run.loss.array)) if run.loss is not None else math.nan for run in runs]
        is_over = not judged["loss"].passed or any(not j.passed for j in judged.values())
        is_finite = math.isfinite(run[0]) == math.isfinite(run[2])
        status = states.DIFFERS if is_over or not is_finite else states.PASSED
        part = "loss" if worst[0] == "loss" else "gradient of the loss"
        row = Row("", "loss", (), status, worst[1].ratio, abs(run[0] - run[2]), abs(run[1] - run[2]), abs(run[2]))
        stage.rows.append(replace(row, own_ratio=worst[1].ratio, own_part=part))
        if status == states.DIFFERS:
            self._fail(stage, "", "in the loss", "" if is_finite else "the loss is finite on one side only")

    def _loss_in_order(
        self,
        root: Pair,
        values: list[Value],
        ours: Mapping[str, Value],
        exact: Mapping[str, Value],
        judged: Mapping[str, Judgement],
    ) -> dict[str, Judgement]:
        """Returns the judgements of the loss with the noise of sums that are taken term by term."""
        if self.b.backend != "torch":
            return {}
        function = (self.losses or (None, None))[1]
        squares: dict[str, Array] = {}
        for index in range(_FEW):
            found = self.b.loss_of(root.noise, values, function, self.targets_b, in_order=index)
            for name in judged:
                distance = squared_distance(found[name].array, exact[name].array)
                squares[name] = squares.get(name, np.zeros(distance.shape)) + distance / _FEW
        again = {}
        for name, item in judged.items():
            if not item.passed and name == "loss":
                noise = np.asarray(exact[name].array) + np.sqrt(squares[name])
                again[name] = judge(ours[name].array, noise, exact[name].array, "fp32")
        return again

    def _judge_gradients(
        self, stage: Stage, pairs: list[Pair], runs: tuple[Run, Run, Run], found: dict[int, dict[str, Judgement]]
    ) -> None:
        if stage.status == states.SKIPPED or not self._wants("gradients"):
            return
        depth = 0
        first: tuple[Pair, _Origin] | None = None
        differing: dict[str, str] = {}
        for pair in pairs:
            origin = self._first_gradient(pair, found.get(pair.b.number, {}))
            if origin is not None:
                first = first or (pair, origin)
                differing.setdefault(pair.path, origin.where)
        for pair in reversed(pairs):  # the order of the backward pass
            own = {n: j for n, j in found.get(pair.b.number, {}).items() if not n.startswith(("output", "statistic"))}
            worst_name = max(own, key=lambda name: own[name].ratio, default=None)
            worst = own[worst_name] if worst_name is not None else None
            status = states.DIFFERS if pair.path in differing else states.PASSED
            if status == states.PASSED and worst is not None and worst.plain_ratio:
                status = states.LESS_EXACT
            note = "its gradient differs only at ties of its inputs" if pair.path in self.ties else ""
            note = note or (_neutral(worst.note) if worst is not None else "")
            for i, j, how in pair.outputs[:1]:
                grads = pair.a.gradients[i], pair.noise.gradients[j], pair.b.gradients[j]
                row = Row(pair.path, "gradient of output", pair.b.outputs[j].array.shape, status)
                if all(g is not None for g in grads):
                    ours = align.to_torch(how, grads[0].array)
                    judged = judge(ours, grads[1].array, grads[2].array, self.dtype, stored=grads[1].dtype)
                    scale = rms(grads[2].array)
                    row = replace(row, ratio=judged.ratio, error=judged.error, noise=judged.noise, scale=scale)
                    if status == states.PASSED and not judged.passed:
                        row = replace(row, status=states.INHERITS if differing else states.LESS_EXACT)
                        if self.ties and not differing:
                            note = (
                                note
                                or f"in the run only, as gradients differ at ties of {', '.join(sorted(self.ties))}"
                            )
                if worst is not None:
                    label = self._gradient_label(pair, worst_name or "")
                    row = replace(row, own_ratio=worst.ratio, own_part=label, ratio=max(row.ratio, worst.ratio))
                where = differing.get(pair.path, "")
                stage.rows.append(replace(row, note=note, where=where, call=pair.b.call, depth=depth))
                depth += 1
        self._parameter_rows(stage, runs, differing)
        if first is not None:
            pair, origin = first
            self._fail(stage, pair.path, origin.where, _neutral(origin.judgement.note) or "in the backward pass")
            self._suggest(pair, found[pair.b.number])
            return
        bad = [row for row in stage.rows if row.part.startswith("gradient of ") and row.status == states.DIFFERS]
        if bad:
            self._fail(stage, bad[0].path, "", bad[0].note)

    def _parameter_rows(self, stage: Stage, runs: tuple[Run, Run, Run], differing: dict[str, str]) -> None:
        own, noise, exact = ({f"gradient:{n}": v for n, v in run.gradients.items()} for run in runs)
        own = {
            f"gradient:{self.parameter_names[name.partition(':')[2]]}": value
            for name, value in own.items()
            if name.partition(":")[2] in self.parameter_names
        }
        judged = judge_values(own, noise, exact, self.dtype)
        over = [name for name, item in judged.items() if item.ratio > FACTOR * self.factor]
        if over and not differing:
            floors = self._propagated({name: exact[name] for name in over})
            for name, floor in floors.items():
                again = judge(
                    own[name].array, noise[name].array, exact[name].array, self.dtype,
                    stored=noise[name].dtype, sampled_noise=floor,
                )  # fmt: skip
                judged[name] = replace(again, plain_ratio=judged[name].ratio)
        for name, item in judged.items():
            path, part = _split_at(name.partition(":")[2], self.b.modules)
            is_over = item.ratio > FACTOR * self.factor
            status = states.LESS_EXACT if item.plain_ratio else states.PASSED
            if not item.passed:
                status = states.INHERITS if differing else states.DIFFERS if is_over else states.LESS_EXACT
            if path in differing and not item.passed:
                status = states.DIFFERS
            values = exact[name].array
            error = np.asarray(noise[name].array, np.float64) - values
            row = Row(
                path, f"gradient of {part}", values.shape, status, item.ratio, item.error, rms(error), rms(values)
            )
            stage.rows.append(replace(row, note=item.note, depth=len(stage.rows)))

    def _first_gradient(self, pair: Pair, judgements: Mapping[str, Judgement]) -> _Origin | None:
        """Returns where in a replay a difference begins, in the order of the backward pass."""
        found = []
        for name, judgement in judgements.items():
            if judgement.passed or name.startswith(("output", "statistic")):
                continue
            order, where = -1.0, ""
            if name.startswith("input ") and name[6:].isdigit():
                child = self._input_place(pair, int(name[6:]))
                if child is not None:
                    order = float(pair.children.index(child))
                    rest = pair.children[pair.children.index(child) + 1 :]
                    own = relative(child.path, pair.path)
                    where = f"between {own} and {relative(rest[0].path, pair.path)}" if rest else f"after {own}"
                elif pair.children:
                    where = f"before {relative(pair.children[0].path, pair.path)}"
            found.append(_Origin(order, where, self._gradient_label(pair, name), name, judgement))
        return max(found, key=lambda origin: (origin.order, origin.judgement.ratio), default=None)

    def _input_place(self, pair: Pair, number: int) -> Pair | None:
        floats = [place for place, item in zip(pair.input_places(), pair.inputs("b"), strict=True) if item.is_float]
        return floats[number][0] if number < len(floats) else None

    def _gradient_label(self, pair: Pair, name: str) -> str:
        if name.startswith("gradient:"):
            return f"gradient of {name.partition(':')[2]}"
        if name.startswith("input ") and name[6:].isdigit():
            child = self._input_place(pair, int(name[6:]))
            if child is not None:
                return f"gradient of the output of {relative(child.path, pair.path)}"
            return "gradient of the input" + (f" {name[6:]}" if name[6:] != "0" else "")
        return f"gradient of the {name}"

    # ---- samples of whole runs ------------------------------------------------------------------------------

    def _agrees_in_samples(self, pairs: list[Pair], row: Row) -> bool:
        """Returns whether the error of an output of the model is that of its modules, propagated."""
        j = _index(row.part)
        i, how = next((i, how) for i, other, how in pairs[0].outputs if other == j)
        ours = align.to_torch(how, pairs[0].a.outputs[i].array)
        theirs, exact = pairs[0].noise.outputs[j], pairs[0].b.outputs[j]
        floor = self._propagated({f"output:{j}": exact}).get(f"output:{j}")
        return judge(ours, theirs.array, exact.array, self.dtype, stored=theirs.dtype, sampled_noise=floor).passed

    def _propagated(self, exact: Mapping[str, Value]) -> dict[str, Array]:
        """Returns the error that values of the run have if every module is as far off as on equal inputs.

        The replays found that each module agrees. The run adds up their errors, and a batch norm or a division may
        enlarge them. So `b` runs again, with sums term by term, and the output of each module and its gradient are
        moved by a random error as large as that of `a` in the replay.

        Args:
            exact: Values of the reference by name: `output:NUMBER` or `gradient:PATH`.
        """
        if self.b.backend != "torch":
            return {}
        loss = (self.losses or (None, None))[1]
        squares: dict[str, Array] = {}
        for index in range(_FEW):
            generator = np.random.default_rng([self.seed, index])

            def moved(
                value: Value, what: str, path: str, number: int, generator: np.random.Generator = generator
            ) -> Value:
                level = self.own_errors.get(path, {}).get(what, 0.0) * rms(value.array)
                noise = _error(generator, value.array.shape) * level
                return Value((value.array + noise).astype(value.array.dtype), value.dtype)

            store = Store()
            sums = backends.module("torch", "tools.sums").summing_in_order(index)
            with backends.module("torch", "tools.probe").perturbing(self.b.module, moved), sums:
                run = self.b.record(self.inputs_a.given, self.inputs_b, store, loss, self.targets_b, True)
            found = {f"output:{j}": item for j, item in enumerate(run.events[0].outputs)}
            found |= {f"gradient:{name}": item for name, item in run.gradients.items()}
            for name, item in exact.items():
                holder, part = _split_at(name.partition(":")[2], self.b.modules)
                own = self.own_errors.get(holder, {}).get(f"gradient:{part}", 0.0) * rms(item.array)
                square = squared_distance(found[name].array, item.array) + own * own
                squares[name] = squares.get(name, np.zeros(square.shape)) + square / _FEW
            store.close()
        return {name: np.sqrt(square) for name, square in squares.items()}

    # ---- optimizer and training -----------------------------------------------------------------------------

    def _train(self, inputs: Inputs) -> None:
        """Compares an optimizer step on equal gradients, and the losses of free-running steps."""
        sides = (self.a, self.b, self.reference)
        gradients = self.gradients
        if not gradients:
            for name in ("optimizer", "training"):
                if self._wants(name):
                    self.stages[name].status = states.SKIPPED
                    self.stages[name].note = "there are no trainable parameters"
            return
        if self.dtype != "fp32":
            for name in ("optimizer", "training"):
                if self._wants(name):
                    self.stages[name].status = states.SKIPPED
                    self.stages[name].note = "parameters are updated in fp32: compare with dtype='fp32'"
            return
        back = {theirs: ours for ours, theirs in self.parameter_names.items()}
        names = [name for name in gradients if name in back]
        for side in sides:
            side.rate = self.rate(names, gradients)
        given_a, given_b = self.optimizers or (None, None)
        if self._wants("optimizer"):
            with self._stage("optimizer") as stage:
                self._judge_updates(stage, names, back, gradients, (given_a, given_b))
        if not self._wants("training"):
            return
        with self._stage("training") as stage:
            size = sum(math.prod(shape) for shape in self.b.shapes.values())
            steps = self.steps if self.steps is not None else 2 if size <= SMALL else 1
            curves = []
            loss_a, loss_b = self.losses or (None, None)
            for side in sides:
                is_test = side is self.a
                values = inputs.values if is_test else self.inputs_b
                loss, targets = (loss_a, self.targets_a) if is_test else (loss_b, self.targets_b)
                curves.append(
                    side.train_steps(
                        inputs.given,
                        values,
                        loss,
                        targets,
                        given_a if is_test else given_b,
                        steps,
                        self.first_runs[sides.index(side)],
                    )
                )
            self.report.losses = dict(zip(("a", "b", "reference"), curves, strict=True))
            finite = [all(map(math.isfinite, losses)) for losses in zip(*curves, strict=True)]
            if not any(all(map(math.isfinite, curve)) for curve in curves):
                stage.note = f"all losses are infinite or NaN after {finite.index(False)} steps"
                curves = [curve[: finite.index(False)] for curve in curves]
            if not curves[0]:
                return
            judged = judge_curve(curves[0], curves[1], curves[2])
            allowed = FACTOR * self.factor
            noise = np.maximum(judged.noise, self.loss_noise)
            ratios = np.where(np.isfinite(judged.ratios), judged.gap / noise, judged.ratios)
            for step, ratio in enumerate(ratios):
                status = (
                    states.PASSED if ratio <= FACTOR else states.LESS_EXACT if ratio <= allowed else states.DIFFERS
                )
                row = Row("", f"loss after {step} steps", (), status, float(ratio), float(judged.gap[step]))
                stage.rows.append(
                    replace(row, noise=float(judged.noise[step]), scale=abs(curves[2][step]), depth=step)
                )
            if float(ratios.max()) > allowed:
                samples = self._curve_samples(inputs, steps, (given_a, given_b))
                if _curve_passes(judged.gap, noise, samples):
                    stage.rows = [replace(r, status=states.PASSED, ratio=min(r.ratio, FACTOR)) for r in stage.rows]
                else:
                    self._fail(stage, "", "in the training steps", f"the losses differ at step {judged.worst_step}")

    def _curve_samples(self, inputs: Inputs, steps: int, given: tuple[Any, Any]) -> Samples[Callable[[int], Any]]:
        loss_b = (self.losses or (None, None))[1]

        def sampled(side: Side, rounds: bool, in_order: bool = False) -> Callable[[int], Any]:
            def sample(index: int) -> list[float]:
                with side.nearby(index, self.inputs_b, rounds, in_order) as moved:
                    return side.train_steps(inputs.given, moved, loss_b, self.targets_b, given[1], steps)

            return sample

        in_order = sampled(self.b, True, True) if self.b.backend == "torch" and self.a.has_foreign("") else None
        return Samples(sampled(self.reference, False), sampled(self.b, True), None, in_order)

    def rate(self, names: Sequence[str], gradients: Mapping[str, Array]) -> float:
        """Returns the learning rate of the default optimizer."""
        return default_rate(names, self.reference.weights(), gradients)

    def _judge_updates(
        self,
        stage: Stage,
        names: list[str],
        back: Mapping[str, str],
        gradients: Mapping[str, Array],
        optimizers: tuple[Any, Any],
    ) -> None:
        """Compares the parameters after steps on equal gradients."""
        frozen = [
            name for name in self.b.trainable_names if back.get(name) and back[name] not in self.a.trainable_names
        ]
        extra = [
            o
            for o in self.a.trainable_names
            if o in self.parameter_names and self.parameter_names[o] not in self.b.trainable_names
        ]
        for name, which in (*((n, "a") for n in frozen), *((self.parameter_names[o], "b") for o in extra)):
            path, part = _split_at(name, self.b.modules)
            note = f"{part} is frozen in {which}, and trained in {'b' if which == 'a' else 'a'}"
            stage.rows.append(Row(path, part, status=states.DIFFERS, ratio=math.inf, note=note))
        sequence = update_gradients(gradients, names)
        updated = []
        for side in (self.a, self.b, self.reference):
            is_test = side is self.a
            given = [{back[n]: g for n, g in step.items()} for step in sequence] if is_test else sequence
            found = side.updated(optimizers[0 if is_test else 1], given)
            if is_test:
                found = {self.parameter_names[n]: array for n, array in found.items() if n in self.parameter_names}
            updated.append(found)
        ours, theirs, exact = updated

        def sampled(side: Side, rounds: bool) -> Callable[[int], dict[str, Value]]:
            def sample(index: int) -> dict[str, Value]:
                perturb = Perturbation("fp32", index, rounds)
                steps = [
                    {n: perturb.array(g, "gradient", n, k) for n, g in step.items()}
                    for k, step in enumerate(sequence)
                ]
                with side.nearby(index, [], rounds):
                    found = side.updated(optimizers[1], steps)
                return {f"parameter:{n}": Value(array, "fp32") for n, array in found.items()}

            return sample

        valued = [
            {f"parameter:{n}": Value(v[n], "fp32") for n in names if n in ours and n in theirs} for v in updated
        ]
        samples = Samples(sampled(self.reference, False), sampled(self.b, True))
        judgements = judge_values(
            valued[0], valued[1], {n: replace(v, dtype="fp32") for n, v in valued[2].items()}, "fp32", samples
        )
        for name in names:
            if f"parameter:{name}" not in judgements:
                continue
            path, part = _split_at(name, self.b.modules)
            judged = judgements[f"parameter:{name}"]
            if not judged.passed:  # 1 - beta^t is rounded in fp32 in MLX
                least = _CORRECTION * rms(exact[name] - self.reference.weights()[name])
                judged = judge(ours[name], theirs[name], exact[name], "fp32", min_noise=least)
            status = states.PASSED if judged.passed else states.DIFFERS
            error = np.asarray(theirs[name], np.float64) - exact[name]
            row = Row(
                path, f"{part} after {len(_SCALES)} updates", exact[name].shape, status, judged.ratio, judged.error
            )
            stage.rows.append(replace(row, noise=rms(error), scale=rms(exact[name]), depth=len(stage.rows)))
        bad = [row for row in stage.rows if not row.passed]
        if bad:
            note = (
                bad[0].note or f"the optimizer: {len(bad)} of {len(stage.rows)} parameters differ after its updates"
            )
            self._fail(stage, bad[0].path, "in the optimizer" if not bad[0].note else "", note)
            self.report.cause = causes.suggest_update(self, back, sequence, updated, optimizers[1])

    # ---- cause and culprit ----------------------------------------------------------------------------------

    def _suggest(self, pair: Pair, judgements: Mapping[str, Judgement]) -> None:
        """Sets the cause of the report, if a known one removes the difference."""
        if not self.options.get("suggest", True):
            return
        try:
            self.report.cause = causes.suggest(self, pair, judgements)
        except Exception as error:  # the difference is found; only its cause is not
            self.report.notes.append(f"the search for a cause stopped: {type(error).__name__}: {error}")

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

    def _finish_modules(self) -> None:
        """Sets the status of each module from the rows."""
        order = [states.DIFFERS, states.CONTAINS, states.INHERITS, states.LESS_EXACT, states.PASSED]
        for _, row in self.report.rows():
            module = self._modules.get(row.path)
            if module is None or module.status == states.SKIPPED:
                continue
            module.ratio = max(module.ratio, row.ratio)
            module.where = module.where or row.where
            if module.status == states.NOT_RUN or order.index(row.status) < order.index(module.status):
                module.status = row.status
        differing = [module.path for module in self.report.modules if module.status == states.DIFFERS]
        for module in self.report.modules:
            contains = any(_is_in(path, module.path) and path != module.path for path in differing)
            if contains and module.status not in (states.DIFFERS, states.SKIPPED):
                module.status = states.CONTAINS


class _AmbiguousAxes(Exception):
    """The shape of an output does not show which of its axes are which."""


class Targets:
    """Random targets of the outputs of a module, as large as the outputs of the reference.

    Args:
        seed: Seed of the targets.
        tools: The `tools.calls` of the side.
        drawn: For `a`: the targets in the axes of the reference, by number of the output.
        hows: The alignment of each output of `a` by its number; None if only shapes are known.
        same: Whether both sides are of one framework.
    """

    def __init__(
        self,
        seed: int,
        tools: Any,
        drawn: dict[int, Value] | None = None,
        hows: Mapping[int, str] | None = None,
        same: bool = False,
    ) -> None:
        self._seed, self._tools, self._hows, self._same = seed, tools, hows, same
        self._drawn = {} if drawn is None else drawn
        self._is_a = drawn is not None

    def on(self, tools: Any, hows: Mapping[int, str] | None, same: bool) -> Targets:
        """Returns the same targets for `a`."""
        return Targets(self._seed, tools, self._drawn, hows, same)

    def __call__(self, outputs: Sequence[Any]) -> list[Value]:
        found = []
        for index, output in enumerate(outputs):
            if "float" not in str(output.dtype):
                continue
            shape = tuple(output.shape)
            if not self._is_a and index not in self._drawn:
                size = rms(self._tools.value(self._tools.snapshot(output)).array) or 1.0
                values = np.random.Generator(np.random.SFC64(self._seed + index)).standard_normal(shape)
                self._drawn[index] = Value(np.asarray(values * size, np.float32), "fp32")
            target = self._drawn.get(index)
            array = (
                None if target is None else self._aligned(index, target.array, shape) if self._is_a else target.array
            )
            zeros = np.zeros(shape, np.float32)
            found.append(Value(zeros if array is None or array.shape != shape else array, "fp32"))
        return found

    def _aligned(self, index: int, target: Array, shape: tuple[int, ...]) -> Array:
        """Returns a target with the axes of `a`."""
        if self._same:
            return target
        if self._hows is not None:
            return align.to_mlx(self._hows.get(index, align.SAME), target)
        moved = align.to_mlx(align.MOVED, target)
        if target.ndim > 2 and moved.shape == target.shape == shape:
            raise _AmbiguousAxes
        return moved if moved.shape == shape else target


class _Replays:
    """The three replays of a call, in the form that `judge_layer` takes."""

    def __init__(self, comparison: Comparison, pair: Pair, known: tuple[Any, Any, dict[str, Value]]) -> None:
        self._c, self._pair = comparison, pair
        self._known = known

    def __call__(self, path: str, call: Call, cotangents: Any) -> dict[str, Value]:
        return self._c.a.replay(self._pair, list(call.args), cotangents)

    def noise(self, path: str, call: Call, cotangents: Any) -> dict[str, Value]:
        return self._c.b_replay(self._pair, list(call.args), cotangents)

    def exact(self, path: str, call: Call, cotangents: Any) -> dict[str, Value]:
        values, seeds, found = self._known
        is_known = (cotangents is None) == (seeds is None) and all(
            x is y for x, y in zip(call.args, values, strict=True)
        )
        if is_known and (seeds is None or all(x is y for x, y in zip(cotangents, seeds, strict=True))):
            return {name: v for name, v in found.items() if self._is_wanted(name)}
        return {
            name: v
            for name, v in self._c.reference.replay(self._pair, list(call.args), cotangents).items()
            if self._is_wanted(name)
        }

    def _is_wanted(self, name: str) -> bool:
        return not name.startswith("gradient ") or name[9:] in self._pair.parameters

    # ---- of an `AlignedReplay` ------------------------------------------------------------------------------

    def by(self, replay: Callable[..., dict[str, Value]]) -> Callable[..., dict[str, Value]]:
        return replay

    def comparable(self, path: str, results: Mapping[str, Value]) -> dict[str, Value]:
        """Returns the results that `a` has, too."""
        statistics = self._c.a.statistics_of(self._pair)
        return {n: v for n, v in results.items() if not n.startswith("statistic ") or n[10:] in statistics}

    def cotangents(self, path: str, drawn: list[Value]) -> list[Value]:
        return drawn

    def samples(self) -> Samples[Any]:
        """Returns the replays in nearby problems."""

        def sampled(side: Side, rounds: bool, in_order: bool = False) -> Callable[..., dict[str, Value]]:
            def sample(index: int, path: str, call: Call, cotangents: Any) -> dict[str, Value]:
                return side.sampled_replay(self._pair, index, list(call.args), cotangents, rounds, in_order)

            return sample

        c, path = self._c, self._pair.a.path
        in_order = sampled(c.b, True, True) if c.b.backend == "torch" and c.a.has_foreign(path) else None
        return Samples(sampled(c.reference, False), sampled(c.b, True), sampled(c.a, False), in_order)


_SCALES = (1.0, 0.5, -1.0)
"""Factors of the gradients of successive updates, which show the moments of an optimizer and their correction."""


def default_rate(names: Sequence[str], weights: Mapping[str, Array], gradients: Mapping[str, Array]) -> float:
    """Returns the learning rate with which a step changes the weights by about a hundredth."""
    sizes = [
        math.sqrt(sum(rms(a) ** 2 * a.size for a in arrays))
        for arrays in ((weights[n] for n in names), (gradients[n] for n in names))
    ]
    return float(np.float32(0.01 * sizes[0] / sizes[1])) if sizes[1] and math.isfinite(sizes[1]) else 0.1


def update_gradients(gradients: Mapping[str, Array], names: Sequence[str]) -> list[dict[str, Array]]:
    """Returns the gradients of successive updates of some parameters, given those of a run."""
    return [{name: np.asarray(gradients[name] * scale, np.float32) for name in names} for scale in _SCALES]


def describe(side: Side) -> dict[str, str]:
    """Returns framework, version, device and TF32 of a side."""
    device = backends.module(side.backend, "tools.probe").device_of(side.module)
    name = str(getattr(device, "type", device)).rpartition(".")[2]
    described = backends.module(side.backend, "tools.environment").describe(name)
    uses = backends.module(side.backend, "nn.arithmetic").uses_tf32(device)
    dtype = "fp64" if side.exact else side.dtype
    return {**described, "dtype": dtype, "tf32": "on" if uses else "off"}


def _curve_passes(gap: Array, noise: Array, samples: Samples[Callable[[int], Any]]) -> bool:
    """Returns whether the distance of two training curves is within the noise of nearby runs.

    Most are far within the noise of the first runs; then no more are trained.
    """
    squares = np.zeros(gap.shape)
    runs = (samples.torch, samples.in_order) if samples.in_order is not None else (samples.torch,)
    for run in runs:
        squares[:] = 0.0
        for index in range(SAMPLES):
            squares += squared_distance(run(index), samples.reference(index))
            worst = float((gap / np.maximum(np.sqrt(squares / (index + 1)), noise)).max())
            if worst <= FACTOR / 2 or (worst <= FACTOR and index + 1 == SAMPLES):
                return True
            if worst > LIMITS.get(index + 1, math.inf):
                break
    return False


def _bias_noise(pair: Pair, name: str, seeds: list[Value] | None) -> Array | None:
    """Returns the noise of the gradient of a bias if it is summed term by term; None for anything else.

    It is the sum of the cotangents, so no replay is needed.
    """
    kind = pair.kind or ""
    is_sum = kind.startswith(("linear", "conv")) or kind in ("layer_norm", "group_norm", "batch_norm")
    if name != "gradient:bias" or seeds is None or not is_sum or not pair.is_leaf:
        return None
    axis = 1 if align.KINDS.get(kind) == align.MOVED else -1
    terms = np.moveaxis(seeds[0].array, axis, -1)
    terms = np.ascontiguousarray(terms, np.float32).reshape(-1, terms.shape[-1])
    exact = terms.sum(axis=0, dtype=np.float64)
    squares = np.zeros(exact.shape)
    for index in range(_FEW):
        start = len(terms) * index // _FEW
        squares += np.square(np.add.accumulate(np.roll(terms, start, axis=0), axis=0)[-1] - exact)
    noise: Array = np.sqrt(squares / _FEW)
    return noise


def _neutral(note: str) -> str:
    """Returns a remark of the yardstick with the names of the sides."""
    for framework, side in (("MLX", "a"), ("PyTorch", "b"), ("one backend", "one side")):
        note = note.replace(f"in {framework}", f"in {side}").replace(f"on {framework}", f"on {side}")
    return note


def _error(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Returns random errors: one for each element, and one for each channel, as of a mean that is subtracted."""
    error = generator.standard_normal(shape)
    for axis in {1, len(shape) - 1} if len(shape) > 1 else ():
        error = error + generator.standard_normal([n if k == axis else 1 for k, n in enumerate(shape)])
    found: Array = error
    return found


def _loss_noise(root: Pair) -> float:
    """Returns the noise of the loss if the errors of the outputs of `b` are independent of one another."""
    total = 0.0
    for item, theirs, gradient in zip(root.b.outputs, root.noise.outputs, root.b.gradients, strict=True):
        if gradient is not None:
            error = np.asarray(theirs.array, np.float64) - item.array
            total += float(np.square(np.where(np.isfinite(error), error, 0.0) * gradient.array).sum())
    return math.sqrt(total)


def _is_same(found: Mapping[str, Value], recorded: list[Value]) -> bool:
    """Returns whether a replay of the reference computes what its run did, but for the rounding of its inputs."""
    for index, item in enumerate(recorded):
        other = found[f"output[{index}]" if index else "output"]
        if other.array.shape != item.array.shape:
            return False
        if not item.is_float or item.array.size == 0:
            continue
        x, y = np.asarray(other.array, np.float64), np.asarray(item.array, np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        if not np.array_equal(np.isfinite(x), np.isfinite(y)) or rms(x[finite] - y[finite]) > _SAME * rms(y[finite]):
            return False
    return True


def _varies(array: Array) -> bool:
    """Returns whether an array has several values; those that layers begin with are often all 0 or all 1."""
    flat = array.reshape(-1)
    return bool((flat != flat[0]).any())


def _are_related(x: Array, y: Array) -> bool:
    """Returns whether two arrays of weights are equal, near to each other, or the same values in another order."""
    if np.array_equal(x, y, equal_nan=True):
        return True
    flat = [np.asarray(v, np.float64).reshape(-1) for v in (x, y)]
    if not all(np.isfinite(v).all() for v in flat):
        return True
    if np.array_equal(np.sort(flat[0]), np.sort(flat[1])) or (flat[0] == flat[1]).mean() > 0.1:
        return True
    centred = [v - v.mean() for v in flat]
    sizes = [rms(v) for v in centred]
    correlation = abs(sum_of_products(*centred)) / (x.size * sizes[0] * sizes[1] or 1.0)
    # independent values have a correlation of about 1 / sqrt(size)
    return correlation > max(0.5, min(0.99, 4 / math.sqrt(x.size)))


def _split_at(name: str, modules: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the path of the module that holds an array, and the name of the array in it."""
    holder = name.rpartition(".")[0]
    while holder and holder not in modules:
        holder = holder.rpartition(".")[0]
    return holder, name[len(holder) + 1 :] if holder else name


def _within(path: str, roots: Any) -> bool:
    return any(_is_in(path, root) for root in roots)


def _is_in(path: str, root: str) -> bool:
    return path == root or root == "" or path.startswith(f"{root}.")


def _is_list(name: str) -> bool:
    return name.endswith((".ModuleList", ".ModuleDict", ".ParameterList", ".ParameterDict"))


def _index(name: str) -> int:
    return int(name.partition("[")[2].rstrip("]") or 0)


def _halves(x: Array, y: Array) -> str:
    """Returns how the rows of one array are those of the other in another order; empty if they are not."""
    for parts in (2, 3, 4):
        if x.ndim and x.shape == y.shape and x.shape[0] % parts == 0 and x.shape[0] > parts:
            blocks = [np.array_equal(p, q) for p, q in zip(np.split(x, parts), np.split(y, parts), strict=True)]
            ours = sorted(p.tobytes() for p in np.split(x, parts))
            if not all(blocks) and ours == sorted(q.tobytes() for q in np.split(y, parts)):
                return f"only in the order of its {parts} blocks of rows, as of gates or of projections q k v"
    return ""


def _histogram(x: Array, y: Array, bins: int = 40) -> Histogram | None:
    """Returns the histogram of the values of both sides; None without finite ones."""
    x, y = (np.asarray(v, np.float64).reshape(-1) for v in (x, y))
    x, y = x[np.isfinite(x)], y[np.isfinite(y)]
    if not x.size or not y.size:
        return None
    edges = np.histogram_bin_edges(np.concatenate([x, y]), bins)
    counts = [tuple(int(n) for n in np.histogram(v, edges)[0]) for v in (x, y)]
    return Histogram(tuple(float(edge) for edge in edges), counts[0], counts[1])
