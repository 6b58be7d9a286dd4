"""The optimizer of a run: its parameter groups, their learning rates and their state in canonical form.

`Optimizer` is the base class of both backends' optimizers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

from numpy.typing import NDArray

from icenet.core.config import TrainingConfig
from icenet.core.training.parameter_groups import Group, assign, check_slots

Array = Any
"""An array of the backend: `mlx.core.array` or `torch.Tensor`."""


class OptimizerGroup(NamedTuple):
    """The parameters that one optimizer of the framework updates."""

    optimizer: Any
    """It has `prepare(step, learning_rate)` and `slots`: canonical slot names by the framework's."""
    lr_scale: float
    """Learning rate relative to the schedule's."""
    state: dict[str, dict[str, Array]]
    """The optimizer's arrays by parameter path and by the framework's slot name."""


class Optimizer(ABC):
    """The optimizers of all parameter groups as one. Its state is zero at first.

    Args:
        training: the section of the configuration.
        model: a `BaseModel`, or the `Shards` of one with PyTorch.
        parameters: the parameters to update, by path.

    Raises:
        ConfigError: a pattern of `training.parameter_groups` matches no parameter.
    """

    def __init__(self, training: TrainingConfig, model: Any, parameters: Mapping[str, Array]) -> None:
        self.name = training.optimizer
        shapes = {path: tuple(self._to_canonical(path, array).shape) for path, array in parameters.items()}
        assigned = assign(training, shapes, model.layer_kinds(), getattr(model.config, "vocab_size", None))
        members: dict[tuple[Group, Hashable], dict[str, Array]] = {}
        for path, group in assigned.items():
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
            CheckpointError: they are the state of another optimizer or model; nothing is changed then.
        """
        own = {name: tuple(self._to_canonical(path, state[slot]).shape) for name, path, state, slot in self._slots()}
        check_slots(own, {name: tuple(array.shape) for name, array in arrays.items()}, self.name)
        for name, path, state, slot in self._slots():
            self._set_slot(path, state, slot, arrays[name])

    def _slots(self) -> Iterator[tuple[str, str, dict[str, Array], str]]:
        """Canonical name, parameter path, the parameter's state, and the framework's name of each slot."""
        for group in self.groups:
            for path, state in group.state.items():
                for slot in state:
                    if slot in group.optimizer.slots:
                        yield f"{path}.{group.optimizer.slots[slot]}", path, state, slot

    # ---- implemented by each backend ---------------------------------------------------------------------

    def _variant(self, path: str, group: Group) -> Hashable:
        """What separates the parameters of one group that need different optimizers. By default nothing does."""
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


def orthogonalize(matrix: Array, norm: Callable[[Array], Array], steps: int = 5) -> Array:
    """Returns a matrix `[rows, columns]` with all singular values moved close to 1, in its own dtype.

    The Newton-Schulz iteration of Muon with the quintic polynomial of Jordan, "Muon: an optimizer for hidden layers
    in neural networks", 2024.

    Args:
        matrix: the matrix.
        norm: the framework's Frobenius norm of a matrix.
        steps: the number of iterations.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (norm(x) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if is_tall else x
