"""MLX's optimizers, with PyTorch's conventions. The mirror is `icenet_torch/engine/optimizers.py`.

Each class fits the parameters of one group, `Optimizer` all of them. What depends on the step alone (learning rate,
bias corrections, decay) is computed on the host in float64 and put in the state as fp32 arrays: MLX computes
1 - beta^t in fp32, which is off by 3e-5 in the first steps, and a compiled step would keep a Python number forever.
docs/training.md has the formulas and their sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from icenet.core.config import TrainingConfig
from icenet.core.training.parameter_groups import Group, assign, check_slots, momentum, muon_factor
from icenet.core.training.schedule import adafactor_scalars, adam_corrections
from icenet.core.weights import layout
from icenet.models import BaseModel

State = dict[str, mx.array]
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""The coefficients of Muon's polynomial (Jordan, 2024)."""


class SGD(optim.SGD):
    """MLX's SGD: with momentum and Nesterov's, without dampening, the decay added to the gradient."""

    slots: ClassVar = {"v": "momentum_buffer"}

    def __init__(self, training: TrainingConfig, group: Group) -> None:
        mass = momentum(training)
        nesterov = training.nesterov and mass > 0
        super().__init__(training.learning_rate, mass, group.weight_decay, nesterov=nesterov)

    def init_single(self, parameter: mx.array, state: State) -> None:
        if self.momentum > 0:
            super().init_single(parameter, state)

    def prepare(self, step: int, learning_rate: float) -> None:
        self.learning_rate = learning_rate


class Adam(optim.Adam):
    """MLX's Adam with exact bias corrections, the decay added to the gradient."""

    slots: ClassVar = {"m": "exp_avg", "v": "exp_avg_sq"}

    def __init__(self, training: TrainingConfig, group: Group) -> None:
        super().__init__(training.learning_rate, [training.beta1, training.beta2], training.eps)
        self.weight_decay = group.weight_decay

    def prepare(self, step: int, learning_rate: float) -> None:
        first, second = adam_corrections(step, *self.betas)
        self.learning_rate = learning_rate
        self.state["step_size"] = mx.array(learning_rate / first, mx.float32)
        self.state["root_correction"] = mx.array(second**0.5, mx.float32)
        self.state["shrink"] = mx.array(1 - learning_rate * self.weight_decay, mx.float32)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: State) -> mx.array:
        if self.weight_decay:
            gradient = gradient + self.weight_decay * parameter
        return self.move(gradient, parameter, state)

    def move(self, gradient: mx.array, parameter: mx.array, state: State) -> mx.array:
        """The step that is left when the decay is done."""
        beta1, beta2 = self.betas
        state["m"] = m = beta1 * state["m"] + (1 - beta1) * gradient
        state["v"] = v = beta2 * state["v"] + (1 - beta2) * mx.square(gradient)
        denominator = mx.sqrt(v) / self.state["root_correction"] + self.eps
        return parameter - self.state["step_size"] * (m / denominator)


class AdamW(Adam):
    """The same, the decay beside the gradient."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: State) -> mx.array:
        return self.move(gradient, parameter * self.state["shrink"] if self.weight_decay else parameter, state)


class Adafactor(optim.Optimizer):
    """Adafactor as PyTorch has it: the learning rate is an upper limit, in units of the parameter's size.

    MLX's own has another epsilon, and factors a convolution's weights over other axes: here they are the last two
    of PyTorch's layout, where MLX has them: `across` the last but one, `along` the last.
    """

    slots: ClassVar = {name: name for name in ("row_var", "col_var", "variance")}
    EPS: ClassVar = (2.0**-23, 1e-3)
    """The least mean square of a gradient in a row, and the least size of a parameter."""

    def __init__(self, training: TrainingConfig, group: Group, across: int, along: int) -> None:
        super().__init__()
        self.weight_decay = group.weight_decay
        self.across, self.along = across, along

    def init_single(self, parameter: mx.array, state: State) -> None:
        if parameter.ndim < 2:
            state["variance"] = mx.zeros_like(parameter)
            return
        for slot, axis in (("row_var", self.along), ("col_var", self.across)):
            shape = list(parameter.shape)
            shape[axis] = 1
            state[slot] = mx.zeros(shape, parameter.dtype)

    def prepare(self, step: int, learning_rate: float) -> None:
        weight, limit = adafactor_scalars(step, learning_rate)
        self.state["weight"] = mx.array(weight, mx.float32)
        self.state["limit"] = mx.array(limit, mx.float32)
        self.state["shrink"] = mx.array(1 - learning_rate * self.weight_decay, mx.float32)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: State) -> mx.array:
        tiny, least_size = self.EPS
        size = mx.maximum(_root_mean_square(parameter), least_size) * self.state["limit"]
        if self.weight_decay:
            parameter = parameter * self.state["shrink"]
        squares = mx.square(gradient)
        if gradient.ndim < 2:
            variance = self.moved(state, "variance", squares)
        else:
            rows = self.moved(state, "row_var", squares.mean(axis=self.along, keepdims=True))
            columns = self.moved(state, "col_var", squares.mean(axis=self.across, keepdims=True))
            variance = rows * columns / mx.maximum(rows.mean(axis=self.across, keepdims=True), tiny)
        update = gradient * mx.rsqrt(mx.maximum(variance, tiny**2))
        return parameter - size / mx.maximum(_root_mean_square(update), 1.0) * update

    def moved(self, state: State, slot: str, values: mx.array) -> mx.array:
        """The running mean of a slot, moved towards the step's values."""
        state[slot] = state[slot] + self.state["weight"] * (values - state[slot])
        return state[slot]


class Lion(optim.Lion):
    """MLX's Lion."""

    slots: ClassVar = {"m": "exp_avg"}

    def __init__(self, training: TrainingConfig, group: Group) -> None:
        super().__init__(training.learning_rate, [training.beta1, training.beta2], group.weight_decay)

    def prepare(self, step: int, learning_rate: float) -> None:
        self.learning_rate = learning_rate


class Muon(optim.Muon):
    """MLX's Muon with the decay beside the gradient, and steps of AdamW's size (see `muon_factor`)."""

    slots: ClassVar = {"v": "momentum_buffer"}

    def __init__(self, training: TrainingConfig, group: Group) -> None:
        super().__init__(training.learning_rate, momentum(training), group.weight_decay, training.nesterov)

    def prepare(self, step: int, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.state["shrink"] = mx.array(1 - learning_rate * self.weight_decay, mx.float32)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: State) -> mx.array:
        mass = self.momentum
        state["v"] = v = mass * state["v"] + (1 - mass) * gradient
        update = orthogonalised(mass * v + (1 - mass) * gradient if self.nesterov else v)
        if self.weight_decay:
            parameter = parameter * self.state["shrink"]
        return parameter - self.learning_rate * muon_factor(parameter.shape) * update


METHODS: dict[str, Any] = {
    "sgd": SGD,
    "adam": Adam,
    "adamw": AdamW,
    "adafactor": Adafactor,
    "lion": Lion,
    "muon": Muon,
}


def orthogonalised(matrix: mx.array, steps: int = 5) -> mx.array:
    """A matrix `[rows, columns]` with all its singular values moved near to 1, in its own dtype.

    Newton and Schulz's iteration with the quintic of Jordan, "Muon: an optimizer for hidden layers in neural
    networks", 2024. MLX's own adds the norm up in one sum, which is off by 3e-4 over a million values.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (mx.sqrt(mx.square(x).sum(axis=-1).sum()) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if tall else x


class OptimizerGroup(NamedTuple):
    """One group: its optimizer, its learning rate in units of the schedule's, and its state by path and slot."""

    optimizer: Any
    lr_scale: float
    slots: dict[str, State]


class Optimizer:
    """The optimizers of all groups as one.

    `state` holds every array that a step changes, in containers that stay the same: a compiled step holds on to them.
    """

    def __init__(self, name: str, groups: list[OptimizerGroup], rules: Mapping[str, layout.Rule]) -> None:
        self.name = name
        self.groups = groups
        self.rules = rules
        self.state = [[part.optimizer.state, part.slots] for part in groups]

    def prepare(self, step: int, learning_rate: float) -> None:
        """Sets the numbers of step 0, 1, ...; called before `update`."""
        for part in self.groups:
            part.optimizer.prepare(step, learning_rate * part.lr_scale)

    def update(self, model: BaseModel, gradients: Any) -> None:
        """Moves the model's parameters; `gradients` is a tree of them."""
        arrays, slopes = dict(tree_flatten(model.trainable_parameters())), dict(tree_flatten(gradients))
        for part in self.groups:
            for path, state in part.slots.items():
                arrays[path] = part.optimizer.apply_single(slopes[path], arrays[path], state)
        model.update(tree_unflatten(list(arrays.items())))


def new_optimizer(training: TrainingConfig, model: BaseModel) -> Optimizer:
    """The optimizer of a run, its state zero.

    Raises:
        ConfigError: a pattern of `training.parameter_groups` fits no parameter.
    """
    kinds, arrays = model.layer_kinds(), dict(tree_flatten(model.trainable_parameters()))
    rules = {path: layout.rule(layout.parameter_kind(kinds, path), layout.split(path)[1]) for path in arrays}
    shapes = {path: shape for path, shape in model.weight_shapes().items() if path in arrays}
    assigned = assign(training, shapes, kinds, getattr(model.config, "vocab_size", None))
    groups: dict[Any, OptimizerGroup] = {}
    for path, group in assigned.items():
        axes = (rules[path].to_torch or (-2, -1))[-2:]
        key = (group, axes if group.method == "adafactor" else None)
        if key not in groups:
            more = axes if group.method == "adafactor" else ()
            groups[key] = OptimizerGroup(METHODS[group.method](training, group, *more), group.lr_scale, {})
        part = groups[key]
        part.slots[path] = {}
        part.optimizer.init_single(arrays[path], part.slots[path])
    optimizer = Optimizer(training.optimizer, list(groups.values()), rules)
    optimizer.prepare(0, 0.0)  # so that a compiled step finds every array of the state
    return optimizer


def state_arrays(optimizer: Optimizer) -> dict[str, mx.array]:
    """The optimizer's state by canonical name (`PATH.exp_avg`), in PyTorch's layouts."""
    return {
        f"{path}.{part.optimizer.slots[slot]}": _relaid(array, optimizer.rules[path].to_torch)
        for part in optimizer.groups
        for path, state in part.slots.items()
        for slot, array in state.items()
    }


def set_state_arrays(optimizer: Optimizer, arrays: Mapping[str, mx.array]) -> None:
    """Puts arrays by canonical name in the optimizer's state, in place: a compiled step holds on to it.

    Raises:
        CheckpointError: they are another optimizer's; nothing is changed then.
    """
    own = {name: tuple(array.shape) for name, array in state_arrays(optimizer).items()}
    check_slots(own, {name: tuple(array.shape) for name, array in arrays.items()}, optimizer.name)
    for part in optimizer.groups:
        for path, state in part.slots.items():
            for slot, array in state.items():
                given = arrays[f"{path}.{part.optimizer.slots[slot]}"].astype(array.dtype)
                state[slot] = _relaid(given, optimizer.rules[path].to_mlx)


def _relaid(array: mx.array, axes: tuple[int, ...] | None) -> mx.array:
    return array if axes is None else mx.contiguous(array.transpose(axes))


def _root_mean_square(array: mx.array) -> mx.array:
    """Row by row first: one long sum in fp32 is off by 3e-4 over a million values in MLX."""
    return mx.sqrt(mx.square(array).mean(axis=-1).mean())
