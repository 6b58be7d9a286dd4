"""The state of one comparison, which its stages, replays and causes share."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from icenet.parity import align
from icenet.parity.arguments import Progress
from icenet.parity.calls.draws import SharedDraws
from icenet.parity.calls.events import Run, Store
from icenet.parity.calls.matching import match_modules, opaque_layers
from icenet.parity.calls.module_side import ModuleSide
from icenet.parity.calls.pairs import Pair, Replay
from icenet.parity.calls.sides import ModuleError, Side
from icenet.parity.calls.targets import Targets
from icenet.parity.inputs import Inputs
from icenet.parity.results import status as states
from icenet.parity.results.report import Report
from icenet.parity.results.result import Module, Stage
from icenet.parity.results.status import ALL_STAGES
from icenet.parity.stages import StageFailed
from icenet.parity.trace import Value

Array = npt.NDArray[Any]


class Comparison(ABC):
    """The state of one comparison, and what it asks of its reference.

    Args:
        a: The module under test.
        b: The reference in the dtype under test.
        reference: The reference in float64.
        names: Class names of the modules.
        stages, dtype, seed, steps: See `compare`.
        options: `rename`, `layout`, `loss`, `optimizer` and `copy_weights` of `compare`, in the order `a`, `b`.
        notes: First remarks of the report.

    Attributes:
        report: The result.
        stages: The stages of the report by name.
        a, b, reference: The sides: `a`, `b` in the dtype under test, and `b` in float64.
        matches: The modules that correspond.
        opaque: Paths in `b` of layers of both frameworks that are compared as one layer.
        different: Paths in `b` of layers whose parameters differ between the frameworks.
        parameter_names: The name in `b` of each array of `a` that both sides have.
        weights_are_equal: Whether all weights of `a` are known to be those of `b`, bit by bit.
        modules: The modules of the report by path.
        inputs_a, inputs_b: The inputs of the current draw, in the axes of each side.
        targets_a, targets_b: The targets of the default loss.
        trains: Whether gradients are computed in training mode.
        backward_error: What the backward pass of `a` raises; None if it returns.
        first_runs: The loss and the gradients of each side on the first inputs.
        gradients: Those of the reference.
        jumps: Whether gradients of a run differ as values of `a` are on the other side of an edge, or seem to.
        computed: The number of values that all modules together return for the first inputs.
        ties: Paths of the modules whose gradients differ only at ties.
        factor: How much less exact the sums of `a` are than those of `b`, as far as it is known.
        loss_noise: The noise of the loss.
        draws: The random numbers that the modules of `a` draw without a key, if they are shared.
        mirrored: Paths in `b` of modules for which it was tried to mirror the uniform numbers of `a`, without effect.
        moved: Paths in `b` of the modules whose inputs have their channels last in `a`, and first in `b`.
        exchanged: Paths in `b` of the modules whose inputs are [B, L, ...] on one side, [L, B, ...] on the other.
        tables: The ids that each embedding of `b` gets for the first inputs, and the number of rows of its table.
        tell: Shows the progress.
    """

    computes_reference = True
    """Whether the reference can compute something else, to find a cause."""
    judges_ties = True
    """Whether layers are computed again with equal inputs moved apart."""

    def __init__(
        self,
        a: ModuleSide,
        b: Side,
        reference: Side,
        names: tuple[str, str],
        stages: Sequence[str],
        dtype: str,
        seed: int,
        steps: int | None,
        options: dict[str, Any],
        notes: Sequence[str] = (),
    ) -> None:
        self.report = Report(dtype=dtype, seed=seed, names=names, notes=list(notes))
        self.stages = {name: Stage(name, states.NOT_RUN if name in stages else states.SKIPPED) for name in ALL_STAGES}
        self.report.stages = list(self.stages.values())
        self.a, self.b, self.reference = a, b, reference
        self.dtype, self.seed, self.steps, self.options = dtype, seed, steps, options
        self.losses, self.optimizers = options["loss"], options["optimizer"]
        self.gradients: dict[str, Array] = {}
        self.jumps = False
        self.computed = 0
        self.inputs_a = Inputs(((), {}), [])
        self.inputs_b: list[Value] = []
        self.trains = True
        self.loss_noise = 0.0
        self.weights_are_equal = False
        self.parameter_names: dict[str, str] = {}
        self.different: set[str] = set()
        self.ties: set[str] = set()
        self.first_runs: list[tuple[float, Mapping[str, Value]] | None] = [None, None, None]
        self.targets_a = self.targets_b = Targets(seed, None)
        self.store = Store()
        self.backward_error: ModuleError | None = None
        self.factor = 1.0
        self.draws: SharedDraws | None = None
        self.moved: set[str] = set()
        self.exchanged: set[str] = set()
        self.mirrored: set[str] = set()
        self.tables: list[tuple[Array, int]] = []
        self.modules: dict[str, Module] = {}
        self.tell: Progress = lambda stage, done, total: None
        if b.backend == "mlx":
            self.report.notes.append(
                "the noise is that of b with its values moved by an ulp, because MLX has no float64"
            )
        self.matches = match_modules(a, b, options["rename"])
        a.names = {match.a: match.b for match in self.matches if match.a is not None and match.b is not None}
        to_a = {match.b: match.a for match in self.matches if match.a is not None and match.b is not None}
        self.opaque = set(opaque_layers(a, b, to_a))
        for path in self.opaque | {p for p in to_a if b.kinds.get(p) in align.DIFFERENT_CALLS}:
            rates = [side.silence(own) for side, own in ((a, to_a[path]), (b, path), (reference, path))]
            if any(rates):
                shown = [", ".join(map(str, sorted(found))) or "0" for found in rates]
                other = f"; its rate is {shown[0]} in a, {shown[1]} in b" if rates[0] != rates[1] else ""
                what = f"the dropout within {path or 'the model'} is left out: its masks have no counterpart{other}"
                self.report.notes.append(what)
        for role, side, given in zip("ab", (a, b), self.optimizers or (), strict=False):
            side.check_optimizer(given, role)
        for role, side in (("a", a), ("b", b), ("reference", reference)):
            self.report.environment[role] = side.describe()
            side.has_one_bias = a.backend != b.backend

    # ---- stages ---------------------------------------------------------------------------------------------

    def wants(self, name: str) -> bool:
        """Returns whether a stage is to be run."""
        return self.stages[name].status != states.SKIPPED

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Measures the time of a stage; if it failed, no other is run."""
        stage = self.stages[name]
        self.tell(name, 0, 1)
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

    def set_mode(self, train: bool) -> None:
        """Sets the mode of all sides."""
        for side in (self.a, self.b, self.reference):
            side.set_mode(train)

    def share_draws(self) -> bool:
        """Makes all sides draw equal random numbers; returns False if they cannot, or do so already."""
        sides = self.a, self.b, self.reference
        if self.draws is not None or not self.computes_reference:
            return False
        dropouts = [{side.names.get(path) for path in side.dropouts()} for side in sides[:2]]
        for side in sides:
            keyed = (dropouts[0] & dropouts[1]) - self.exchanged  # each row of a batch has a key
            side.shared_dropouts = frozenset(p for p in side.dropouts() if side.names[p] in keyed)
        matched = {match.b: match.b for match in self.matches if match.a is not None and match.b is not None}
        numbers = SharedDraws(self.seed, matched)
        self.reference.draws, self.b.draws = numbers, SharedDraws(self.seed, matched)
        self.a.draws = self.draws = SharedDraws(self.seed, self.a.names, numbers, self.moved, self.exchanged)
        return True

    def add_notes(self, notes: Sequence[str]) -> None:
        """Adds remarks to the report, each once."""
        self.report.notes += [note for note in notes if note not in self.report.notes]

    def notes_of(self, path: str) -> list[str]:
        """Returns the list of remarks on a module."""
        module = self.modules.get(path)
        return module.notes if module is not None else self.report.notes

    # ---- what the reference provides ------------------------------------------------------------------------

    @abstractmethod
    def reference_run(self, inputs: Inputs, *arguments: Any) -> Run:
        """Returns the run of the reference, and sets the inputs in its axes."""

    @abstractmethod
    def replay_of(self, pair: Pair, gradients: bool) -> Replay:
        """Returns the replay of a call: the inputs of the reference, rounded, and random cotangents."""

    @abstractmethod
    def b_replay(self, given: Replay) -> dict[str, Value]:
        """Returns a replay of `b` in the dtype under test."""

    @abstractmethod
    def propagated(
        self, exact: Mapping[str, Value], pairs: list[Pair], gradients: bool = True, quick: bool = False
    ) -> dict[str, Array]:
        """Returns the error that values of the run have if every module is as far off as on equal inputs."""

    @abstractmethod
    def rate(self, names: Sequence[str], gradients: Mapping[str, Array]) -> float:
        """Returns the learning rate of the default optimizer."""

    def gradients_agree(self, inputs: Inputs, a: Any, b: Any) -> bool:
        """Returns whether two modules with the weights of a training step agree up to the stage `gradients`."""
        return False

    @abstractmethod
    def suggest(self, pair: Pair, judgements: Mapping[str, Any]) -> None:
        """Sets the cause of the report, if a known one explains the difference of a call."""
