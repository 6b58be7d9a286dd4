"""A side of a comparison: a module in a role, and what a comparison asks of it.

`module_side` computes it with a copy of a module, `icenet.parity.recordings.recorded_side` reads it from a trace.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from icenet.core.errors import OutsideTableError
from icenet.core.messages import first_line
from icenet.parity.calls.draws import SharedDraws
from icenet.parity.calls.events import Event, Run, Store
from icenet.parity.calls.pairs import Pair, Replay, Sample
from icenet.parity.nearby import Perturbation
from icenet.parity.trace import Value

Array = npt.NDArray[Any]

Targets = Callable[[Sequence[Any], Sequence[str]], Sequence["Value | None"]]
"""Returns the targets of the default loss, given the arrays that the module returns, and their names."""

Follow = Callable[[int, Mapping[str, Value]], Mapping[str, Value]]
"""Returns the gradients that a training step applies, given its number and those that it computed."""


class Side(ABC):
    """A module in a role of a comparison.

    Attributes:
        backend: "mlx" or "torch".
        dtype: Compute dtype under test.
        is_reference: Whether it is the reference.
        exact: Whether it computes in float64 (PyTorch only).
        tools: The `tools.calls` of its backend.
        module: The copy that computes; None for a recorded side.
        modules: Its modules by path.
        kinds: Kind of the call of each module whose class defines its axes, by path.
        layer_kinds: Kind of the parameters of each layer, by path.
        classes: Full name of the class of each module, by path.
        shapes: The canonical shape of each array, by path.
        trainable_names: The paths of the trainable parameters, those of shared ones at each place.
        depends_on_mode: Whether it may compute something else in training mode than in evaluation mode.
        is_mode_of_norms: Whether only norms of the frameworks may do so; False for a recorded side.
        perturbation: Moves all values by an ulp, for the noise of a module of MLX; None otherwise.
        train: Whether it is in training mode.
        drew: Whether the last run drew random numbers without a key.
        draws: The random numbers that its modules draw without a key; None to draw from the framework.
        shared_dropouts: Paths of the dropout layers whose masks have keys on both sides, if draws are shared.
        loss_scale: Factor of the gradients that `record` returns.
        rate: Learning rate of the default optimizer.
        has_one_bias: Whether the other side has one bias per gate in its recurrent layers.
    """

    tools: Any
    module: Any = None
    modules: dict[str, Any]
    kinds: dict[str, str]
    layer_kinds: dict[str, str]
    classes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    trainable_names: set[str]
    depends_on_mode: bool
    is_mode_of_norms: bool = False
    perturbation: Perturbation | None = None
    train = False
    drew = False
    shared_dropouts: frozenset[str] = frozenset()
    draws: SharedDraws | None = None
    loss_scale = 1.0
    rate = 0.1
    has_one_bias = False

    def __init__(self, backend: str, dtype: str, exact: bool, paths: Mapping[str, bool]) -> None:
        """Sets what all sides have. `paths` tells whether the user's module at a path is in training mode."""
        self.backend, self.dtype = backend, dtype
        self.is_reference, self.exact = exact, exact and backend == "torch"
        self._modes = dict(paths)
        self._names = {path: path for path in paths}
        self._back: dict[str, str] = {}

    # ---- what the module is ---------------------------------------------------------------------------------

    @property
    def names(self) -> dict[str, str]:
        """The path in the reference of each module, by its own path."""
        return self._names

    @names.setter
    def names(self, names: Mapping[str, str]) -> None:
        self._names = dict(names)
        self._back = {theirs: ours for ours, theirs in names.items()}

    def own_path(self, path: str) -> str | None:
        """Returns the path of a module of this side, by its path in the reference; None if it has none."""
        return self._back.get(path)

    @property
    def is_sequence_first(self) -> bool:
        """Whether a layer takes [L, B, D], as the recurrent layers, attention and transformers of PyTorch may."""
        return any(getattr(module, "batch_first", True) is False for module in self.modules.values())

    def mode(self, path: str) -> bool:
        """Returns whether the user's module at a path is in training mode."""
        return self._modes[path]

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Returns framework, version, device, dtype and TF32."""

    @abstractmethod
    def depends_on_mode_at(self, path: str) -> bool:
        """Returns whether the module at a path itself may compute something else in training mode."""

    @abstractmethod
    def dropout_rate(self, path: str) -> float:
        """Returns the rate of a dropout layer; 0 for other modules."""

    def dropouts(self) -> list[str]:
        """Returns the paths of the dropout layers with a rate above zero, in training mode."""
        return []

    @abstractmethod
    def weights(self) -> dict[str, Array]:
        """Returns the canonical weights."""

    def native_weights(self, names: Sequence[str]) -> Mapping[str, Array]:
        """Returns some weights with the axes of the framework, by path. They must not be changed."""
        return self.weights()

    @abstractmethod
    def own_arrays(self, path: str) -> dict[str, Array]:
        """Returns the parameters and buffers of the module at a path itself, not of those within it, by name."""

    @abstractmethod
    def parameters_within(self, path: str) -> list[str]:
        """Returns the trainable parameters of the module at a path, by path within it."""

    def own_names(self, path: str) -> list[str]:
        """Returns the paths of the arrays of the module at a path itself."""
        prefix = f"{path}." if path else ""
        return [n for n in self.shapes if n.startswith(prefix) and "." not in n[len(prefix) :]]

    # ---- modes ----------------------------------------------------------------------------------------------

    @abstractmethod
    def set_mode(self, train: bool) -> None:
        """Sets the mode: evaluation, or that of training with the layers that the user froze."""

    def switch_off(self, path: str) -> bool:
        """Keeps a module in evaluation mode, with what only this side has in it; returns whether it was not.

        Args:
            path: Its path in the reference.
        """
        return False

    @abstractmethod
    def set_channels(self, path: str, is_moved: bool) -> None:
        """Tells a dropout layer whether its input has channels first in PyTorch and last in MLX."""

    @abstractmethod
    def set_sequence_first(self, path: str) -> None:
        """Draws the masks of an MLX dropout of [B, L, ...] as those of [L, B, ...], of a trace of PyTorch."""

    def silence(self, path: str) -> set[float]:
        """Sets the rate of all dropouts within a layer to zero; returns those above."""
        rates = set()
        for inner, module in self.modules.items():
            if inner != path and not inner.startswith(f"{path}."):
                continue
            for name, none in (("p", 0.0), ("_p_1", 1.0), ("dropout", 0.0)):
                if isinstance(value := getattr(module, name, None), float) and value != none:
                    rates.add(round(abs(value - none), 9))
                    setattr(module, name, none)
        return rates

    def eager(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which nothing is compiled: each replay is another function, called once."""
        return contextlib.nullcontext()

    # ---- runs -----------------------------------------------------------------------------------------------

    @abstractmethod
    def record(
        self,
        given: Any,
        inputs: Sequence[Value],
        store: Store,
        loss: Any = None,
        targets: Targets | None = None,
        cotangent: bool = False,
        inner: bool = True,
        only_gradients: bool = False,
    ) -> Run:
        """Calls the module and records all events.

        Args:
            given: `(args, kwargs)` with slots for the inputs.
            inputs: The arrays of the arguments.
            store: Keeps the arrays.
            loss: The user's loss of the output; None for the distance from `targets`.
            targets: Returns the target of each floating output, in the axes of this side, given the outputs.
            cotangent: Whether to compute the loss and its gradients.
            inner: Whether to record the calls of the modules within it. Without them, replays follow the run before.
            only_gradients: Whether to leave out the arguments and the outputs of the calls.

        Raises:
            ModuleError: The module raises an error.
        """

    def drawing_module(self, given: Any, inputs: Sequence[Value]) -> str | None:
        """Returns the path of a module that draws random numbers without a key in a call; None without one."""
        return None

    @abstractmethod
    def nearby(self, sample: Sample, inputs: Sequence[Value]) -> contextlib.AbstractContextManager[list[Value]]:
        """Sets the weights to those of a nearby problem while the context is open; yields its inputs."""

    @abstractmethod
    def loss_of(
        self,
        event: Event,
        outputs: Sequence[Value],
        loss: Any,
        targets: Targets,
        in_order: int | None = None,
    ) -> dict[str, Value]:
        """Returns the loss of given outputs, and its gradient by each of them.

        Args:
            event: The call of the module, for the structure of its result.
            outputs: The outputs, in the axes of this side.
            loss: The loss of the user; None for the distance from the targets.
            targets: See `record`.
            in_order: Number of a sample in which PyTorch sums term by term; None for a usual run.
        """

    # ---- updates --------------------------------------------------------------------------------------------

    @abstractmethod
    def check_optimizer(self, given: Any, role: str) -> None:
        """Raises UsageError if no optimizer can be made of what the user gave."""

    @abstractmethod
    def updated(
        self,
        optimizer: Any,
        gradients: Iterable[Mapping[str, Array]],
        change: Callable[[Any, int], None] | None = None,
        rows: Mapping[str, int] | None = None,
    ) -> dict[str, Array]:
        """Returns the canonical weights after a step of an optimizer on each of the gradients.

        Args:
            optimizer: The optimizer of the user; None for SGD.
            gradients: Of each step, by path.
            change: Changes the options of the optimizer before a step, given its number.
            rows: How many of its first rows a parameter and its gradients have, by path; None for all.
        """

    @abstractmethod
    def train_steps(
        self,
        given: Any,
        inputs: Sequence[Value],
        loss: Any,
        targets: Targets,
        optimizer: Any,
        steps: int,
        first: tuple[float, Mapping[str, Value]] | None = None,
        follow: Follow | None = None,
    ) -> list[float]:
        """Returns the losses before the first and after each training step.

        Args:
            given, inputs, loss, targets: See `record`.
            optimizer: The optimizer of the user; None for SGD.
            steps: Number of steps.
            first: The loss and the gradients before the first step, if they are known.
            follow: Called before each update, when the module has the weights of the step.
        """

    # ---- replays --------------------------------------------------------------------------------------------

    @abstractmethod
    def arrange(self, a: Side, pairs: list[Pair]) -> None:
        """Changes the calls that replays leave out to those that this side has the results of."""

    @abstractmethod
    def replay(self, given: Replay) -> dict[str, Value]:
        """Computes what a module does itself in a call, given its arguments and the results of the calls within it.

        Returns:
            `output`, `output[1]`, ... for the results, and `input 0`, ... for the gradients by the floating inputs,
            in the axes of the reference; `gradient NAME` for parameters and `statistic NAME` for running statistics.

        Raises:
            ReplayError: It cannot be computed.
        """

    @abstractmethod
    def sampled_replay(self, given: Replay, sample: Sample) -> dict[str, Value]:
        """Replays in a nearby problem."""


class ModuleError(Exception):
    """A module of the user raised an error.

    Attributes:
        side: The side.
        path: Path of the innermost module that raised.
        run: The events until then.
        in_backward: Whether all modules had returned.
        is_outside: Whether an embedding got an id outside its table.
    """

    def __init__(self, side: Side, path: str, error: Exception, run: Run, in_backward: bool = False) -> None:
        self.side, self.path, self.run, self.in_backward = side, path, run, in_backward
        self.reason, self.is_outside = first_line(error), isinstance(error, OutsideTableError)
        super().__init__(f"{path or 'the model'}: {type(error).__name__}: {self.reason}")
