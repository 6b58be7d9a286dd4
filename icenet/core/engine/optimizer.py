"""The optimizer of a run: its parameter groups, their learning rates and their state in canonical form.

`Optimizer` is the base class of both backends' optimizers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

from numpy.typing import NDArray

from icenet.core.config import TrainingConfig
from icenet.core.engine.batches import Array
from icenet.core.engine.parameter_groups import Group, Shape, assign
from icenet.core.errors import CheckpointError


class OptimizerGroup(NamedTuple):
    """The parameters that one optimizer of the framework updates."""

    optimizer: Any
    """The framework's optimizer, with `prepare(step, learning_rate)` and `slots`: canonical slot names by its own."""
    lr_scale: float
    """Learning rate relative to the schedule's."""
    state: dict[str, dict[str, Array]]
    """The optimizer's arrays by parameter path and by the framework's slot name."""


class Optimizer(ABC):
    """The optimizers of all parameter groups as one. Its state is zero at first.

    Args:
        training: The section of the configuration.
        model: A `BaseModel`, or the `Shards` of one with PyTorch.
        parameters: The parameters to update, by path.

    Raises:
        ConfigError: A pattern of `training.parameter_groups` matches no parameter.
    """

    def __init__(self, training: TrainingConfig, model: Any, parameters: Mapping[str, Array]) -> None:
        self.name = training.optimizer
        shapes = {path: tuple(self._to_canonical(path, array).shape) for path, array in parameters.items()}
        self.assigned = assign(training, shapes, model.layer_kinds(), getattr(model.config, "vocab_size", None))
        """Method, learning rate and weight decay of each parameter, by path."""
        members: dict[tuple[Group, Hashable], dict[str, Array]] = {}
        for path, group in self.assigned.items():
            members.setdefault((group, self._variant(path, group)), {})[path] = parameters[path]
        self.groups = [self._new_group(training, group, variant, own) for (group, variant), own in members.items()]

    def prepare(self, step: int, learning_rate: float) -> None:
        """Sets the learning rate and the other scalars of step 0, 1, ...; called before `update`."""
        for group in self.groups:
            group.optimizer.prepare(step, learning_rate * group.lr_scale)

    @abstractmethod
    def update(self, gradients: Mapping[str, Array]) -> None:
        """Updates the parameters with their gradients, by path."""

    # ---- state -------------------------------------------------------------------------------------------

    def state_arrays(self) -> dict[str, NDArray[Any]]:
        """Returns a copy of the state by canonical name (`PATH.exp_avg`), in PyTorch's layouts."""
        return {
            name: self._to_numpy(self._to_canonical(path, state[slot])) for name, path, state, slot in self._slots()
        }

    def set_state_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Sets the state from arrays by canonical name.

        Raises:
            CheckpointError: They are the state of another optimizer or model; nothing is changed then.
        """
        own = {name: tuple(self._to_canonical(path, state[slot]).shape) for name, path, state, slot in self._slots()}
        check_slots(own, {name: tuple(array.shape) for name, array in arrays.items()}, self.name)
        for name, path, state, slot in self._slots():
            self._set_slot(path, state, slot, arrays[name])

    def _slots(self) -> Iterator[tuple[str, str, dict[str, Array], str]]:
        """Yields canonical name, parameter path, the parameter's state, and the framework's name of each slot."""
        for group in self.groups:
            for path, state in group.state.items():
                for slot in state:
                    if slot in group.optimizer.slots:
                        yield f"{path}.{group.optimizer.slots[slot]}", path, state, slot

    # ---- implemented by each backend ---------------------------------------------------------------------

    def _variant(self, path: str, group: Group) -> Hashable:
        """Returns a key by which the parameters of one group are divided among several optimizers; default: one."""
        return None

    @abstractmethod
    def _new_group(
        self, training: TrainingConfig, group: Group, variant: Any, parameters: dict[str, Array]
    ) -> OptimizerGroup:
        """Returns the framework's optimizer of some parameters, with its initial state."""

    @abstractmethod
    def _to_canonical(self, path: str, array: Array) -> Array:
        """Returns a parameter, or a slot of it, in PyTorch's layout."""

    @abstractmethod
    def _to_numpy(self, array: Array) -> NDArray[Any]:
        """Returns a copy of an array."""

    @abstractmethod
    def _set_slot(self, path: str, state: dict[str, Array], slot: str, values: NDArray[Any]) -> None:
        """Sets one array of the state from canonical values, without replacing the dictionary that holds it."""


def check_slots(wanted: Mapping[str, Shape], found: Mapping[str, Shape], optimizer: str) -> None:
    """Checks that the optimizer state of a checkpoint fits the optimizer.

    Args:
        wanted: Shapes of the optimizer's state, by `PATH.SLOT`.
        found: Shapes in the checkpoint.
        optimizer: Value of `training.optimizer`.

    Raises:
        CheckpointError: It is the state of another optimizer or of another model.
    """
    missing = next((name for name in wanted if name not in found), None)
    extra = next((name for name in found if name not in wanted), None)
    if missing is None and extra is None:
        for name, shape in wanted.items():
            if tuple(found[name]) != tuple(shape):
                raise CheckpointError(
                    f"the checkpoint's optimizer state {name!r} has shape {list(found[name])}, not {list(shape)}; "
                    "resume with the model and training.parameter_groups of the run's config.yaml"
                )
        return
    if missing is not None:
        difference = f"has no {missing!r}, which {optimizer} needs"
    else:
        difference = f"has {extra!r}, which {optimizer} does not have"
    slots = {name.rpartition(".")[2] for name in found}
    writers, settings = next(((names, setting) for names, setting, sets in _SLOTS if slots in sets), ((), ""))
    if not writers or optimizer in writers:
        remedy = "resume with the model and the training section of the run's config.yaml"
    else:
        remedy = f"it was written by {' or '.join(writers)}: resume with {settings}"
    raise CheckpointError(
        f"the checkpoint's optimizer state {difference}; {remedy}, or start a new run to change the optimizer"
    )


_ADAM, _FACTORED = {"exp_avg", "exp_avg_sq"}, {"row_var", "col_var"}
_SLOTS: list[tuple[tuple[str, ...], str, list[set[str]]]] = [
    (("adamw", "adam"), "--set training.optimizer=adamw", [_ADAM]),
    (("sgd",), "--set training.optimizer=sgd", [{"momentum_buffer"}]),
    (("sgd without momentum",), "--set training.optimizer=sgd --set training.momentum=0", [set()]),
    (("adafactor",), "--set training.optimizer=adafactor", [{*_FACTORED, "variance"}, _FACTORED, {"variance"}]),
    (("lion",), "--set training.optimizer=lion", [{"exp_avg"}]),
    (("muon",), "--set training.optimizer=muon", [{*_ADAM, "momentum_buffer"}, {"momentum_buffer"}]),
]
"""Names of optimizers, the option that selects them, and the sets of slots that their state can have."""


def orthogonalize(matrix: Array, norm: Callable[[Array], Array]) -> Array:
    """Returns matrices `[..., rows, columns]` with all singular values moved close to 1, in their own dtype.

    Five steps of the Newton-Schulz iteration of Muon, with the quintic polynomial of Jordan, "Muon: an optimizer for
    hidden layers in neural networks", 2024.

    Args:
        matrix: The matrices.
        norm: The framework's Frobenius norm of matrices, `[..., 1, 1]`.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.swapaxes(-1, -2) if is_tall else matrix
    x = x / (norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.swapaxes(-1, -2) if is_tall else x
