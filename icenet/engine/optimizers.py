"""MLX's optimizers, with PyTorch's conventions. The mirror is `icenet_torch/engine/optimizers.py`.

Each class updates the parameters of one group; `Optimizer` combines all groups. Scalars that depend on the step only
(learning rate, bias corrections, decay) are computed on the host in float64 and stored in the state as fp32 arrays:
MLX computes 1 - beta^t in fp32, which is off by 3e-5 in the first steps, and a compiled step would keep the value
that a Python number has when it is traced. docs/optimizers.md has the formulas and their sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from icenet.core.config import TrainingConfig
from icenet.core.engine import optimizer
from icenet.core.engine.optimizer import OptimizerGroup, orthogonalize
from icenet.core.engine.parameter_groups import Group, momentum, muon_factor
from icenet.core.training.schedule import adafactor_scalars, adam_corrections
from icenet.core.weights import layout
from icenet.models import BaseModel
from icenet.nn import training_kernels, tree
from icenet.nn.arrays import from_numpy, to_numpy

State = dict[str, mx.array]
"""The arrays of one parameter by slot."""


class SGD(optim.SGD):
    """MLX's SGD with momentum (also Nesterov's), without dampening; weight decay is added to the gradient."""

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
    """MLX's Adam with exact bias corrections; weight decay is added to the gradient."""

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
        if training_kernels.has_kernels():
            self.state["rates"] = mx.array([learning_rate / first, second**0.5], mx.float32)
            self.state["decays"] = mx.array(self.decays(learning_rate), mx.float32)

    def decays(self, learning_rate: float) -> tuple[float, float]:
        """Returns the factor of the parameter and the weight decay that is added to the gradient."""
        return 1.0, self.weight_decay

    def apply_all(
        self, gradients: Sequence[mx.array], factor: mx.array, parameters: Sequence[mx.array], states: Sequence[State]
    ) -> list[mx.array]:
        """Computes `apply_single` of gradients times a factor `[1]`, in few kernels on CUDA; all are fp32."""
        first, second = ([state[slot] for state in states] for slot in ("m", "v"))
        numbers = factor, self.state["rates"], self.state["decays"], self.eps, self.betas
        found = training_kernels.adam(parameters, gradients, first, second, *numbers)
        for state, (_, m, v) in zip(states, found, strict=True):
            state["m"], state["v"] = m, v
        return [parameter for parameter, _, _ in found]

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: State) -> mx.array:
        if self.weight_decay:
            gradient = gradient + self.weight_decay * parameter
        return self.adam_step(gradient, parameter, state)

    def adam_step(self, gradient: mx.array, parameter: mx.array, state: State) -> mx.array:
        """Returns the parameter after Adam's step, without weight decay."""
        beta1, beta2 = self.betas
        state["m"] = m = beta1 * state["m"] + (1 - beta1) * gradient
        state["v"] = v = beta2 * state["v"] + (1 - beta2) * mx.square(gradient)
        denominator = mx.sqrt(v) / self.state["root_correction"] + self.eps
        return parameter - self.state["step_size"] * (m / denominator)


class AdamW(Adam):
    """Adam with decoupled weight decay."""

    def decays(self, learning_rate: float) -> tuple[float, float]:
        return 1 - learning_rate * self.weight_decay, 0.0

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: State) -> mx.array:
        return self.adam_step(gradient, parameter * self.state["shrink"] if self.weight_decay else parameter, state)


class Adafactor(optim.Optimizer):
    """Adafactor as in PyTorch: the learning rate is an upper limit, relative to the RMS of the parameter.

    MLX's own has another epsilon and factors the weights of a convolution over other axes. Here these are the last
    two axes of PyTorch's layout: in MLX's layout `row_axis` is the last but one of them and `column_axis` the last.
    """

    slots: ClassVar = {name: name for name in ("row_var", "col_var", "variance")}
    EPS: ClassVar = (2.0**-23, 1e-3)
    """The lower limits of a gradient's mean square in a row, and of a parameter's RMS."""

    def __init__(self, training: TrainingConfig, group: Group, row_axis: int, column_axis: int) -> None:
        super().__init__()
        self.weight_decay = group.weight_decay
        self.row_axis, self.column_axis = row_axis, column_axis

    def init_single(self, parameter: mx.array, state: State) -> None:
        if parameter.ndim < 2:
            state["variance"] = mx.zeros_like(parameter)
            return
        for slot, axis in (("row_var", self.column_axis), ("col_var", self.row_axis)):
            shape = list(parameter.shape)
            shape[axis] = 1
            state[slot] = mx.zeros(shape, parameter.dtype)

    def prepare(self, step: int, learning_rate: float) -> None:
        weight, limit = adafactor_scalars(step, learning_rate)
        self.state["weight"] = mx.array(weight, mx.float32)
        self.state["limit"] = mx.array(limit, mx.float32)
        self.state["shrink"] = mx.array(1 - learning_rate * self.weight_decay, mx.float32)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: State) -> mx.array:
        eps, min_rms = self.EPS
        step_size = mx.maximum(_root_mean_square(parameter), min_rms) * self.state["limit"]
        if self.weight_decay:
            parameter = parameter * self.state["shrink"]
        squares = mx.square(gradient)
        if gradient.ndim < 2:
            variance = self.running_mean(state, "variance", squares)
        else:
            rows = self.running_mean(state, "row_var", squares.mean(axis=self.column_axis, keepdims=True))
            columns = self.running_mean(state, "col_var", squares.mean(axis=self.row_axis, keepdims=True))
            variance = rows * columns / mx.maximum(rows.mean(axis=self.row_axis, keepdims=True), eps)
        update = gradient * mx.rsqrt(mx.maximum(variance, eps**2))
        return parameter - step_size / mx.maximum(_root_mean_square(update), 1.0) * update

    def running_mean(self, state: State, slot: str, values: mx.array) -> mx.array:
        """Updates the running mean of a slot with the step's values and returns it."""
        state[slot] = state[slot] + self.state["weight"] * (values - state[slot])
        return state[slot]


class Lion(optim.Lion):
    """MLX's Lion (Chen et al., 2023)."""

    slots: ClassVar = {"m": "exp_avg"}

    def __init__(self, training: TrainingConfig, group: Group) -> None:
        super().__init__(training.learning_rate, [training.beta1, training.beta2], group.weight_decay)

    def prepare(self, step: int, learning_rate: float) -> None:
        self.learning_rate = learning_rate


class Muon(optim.Muon):
    """MLX's Muon (Jordan, 2024) with decoupled weight decay and steps of AdamW's size (see `muon_factor`)."""

    slots: ClassVar = {"v": "momentum_buffer"}

    def __init__(self, training: TrainingConfig, group: Group) -> None:
        super().__init__(training.learning_rate, momentum(training), group.weight_decay, training.nesterov)

    def prepare(self, step: int, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.state["shrink"] = mx.array(1 - learning_rate * self.weight_decay, mx.float32)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: State) -> mx.array:
        mass = self.momentum
        state["v"] = v = mass * state["v"] + (1 - mass) * gradient
        update = orthogonalize(mass * v + (1 - mass) * gradient if self.nesterov else v, frobenius_norm)
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
"""Optimizers by the value of `training.optimizer`."""


def frobenius_norm(matrix: mx.array) -> mx.array:
    """Returns the norms of matrices, summed row by row: in MLX one sum is off by 3e-4 for a million values."""
    return mx.sqrt(mx.square(matrix).sum(axis=-1, keepdims=True).sum(axis=-2, keepdims=True))


class Optimizer(optimizer.Optimizer):
    """See `icenet.core.engine.optimizer.Optimizer`.

    `state` holds every array that a step changes, in containers that stay the same: a compiled step captures them.
    """

    def __init__(self, training: TrainingConfig, model: BaseModel) -> None:
        self._parameters = tree.Arrays(model)
        kinds, parameters = model.layer_kinds(), self._parameters.get()
        self._rules = {
            path: layout.rule(layout.parameter_kind(kinds, path), layout.split(path)[1]) for path in parameters
        }
        super().__init__(training, model, parameters)
        self.state = [[group.optimizer.state, group.state] for group in self.groups]
        self.prepare(0, 0.0)  # a compiled step needs every array of the state when it is traced

    def update(self, gradients: Mapping[str, mx.array], factor: mx.array | None = None) -> None:
        """Updates the parameters with their gradients times a factor `[]`."""
        arrays = self._parameters.get()
        one = mx.ones((1,)) if factor is None else factor.reshape(1)
        for group in self.groups:
            own, together = group.optimizer, []
            if isinstance(own, Adam) and training_kernels.has_kernels():
                together = [path for path in group.state if _is_plain(arrays[path]) and _is_plain(gradients[path])]
                own_gradients, parameters = ([values[path] for path in together] for values in (gradients, arrays))
                states = [group.state[path] for path in together]
                arrays.update(zip(together, own.apply_all(own_gradients, one, parameters, states), strict=True))
            for path, state in group.state.items():
                if not together or path not in together:
                    gradient = gradients[path] if factor is None else gradients[path] * factor
                    arrays[path] = own.apply_single(gradient, arrays[path], state)
        self._parameters.set(arrays)

    def _variant(self, path: str, group: Group) -> tuple[int, ...]:
        """Returns the axes over which Adafactor factors a parameter; MLX's layout of convolutions has others."""
        return (self._rules[path].to_torch or (-2, -1))[-2:] if group.method == "adafactor" else ()

    def _new_group(
        self, training: TrainingConfig, group: Group, variant: tuple[int, ...], parameters: dict[str, mx.array]
    ) -> OptimizerGroup:
        own = METHODS[group.method](training, group, *variant)
        state: dict[str, State] = {path: {} for path in parameters}
        for path, parameter in parameters.items():
            own.init_single(parameter, state[path])
        return OptimizerGroup(own, group.lr_scale, state)

    def _to_canonical(self, path: str, array: mx.array) -> mx.array:
        return _transposed(array, self._rules[path].to_torch)

    def _to_numpy(self, array: mx.array) -> np.ndarray:
        return to_numpy(array)

    def _set_slot(self, path: str, state: State, slot: str, values: np.ndarray) -> None:
        state[slot] = _transposed(from_numpy(values).astype(state[slot].dtype), self._rules[path].to_mlx)


def _is_plain(array: mx.array) -> bool:
    return array.dtype == mx.float32 and array.size > 0


def _transposed(array: mx.array, axes: tuple[int, ...] | None) -> mx.array:
    return array if axes is None else mx.contiguous(array.transpose(axes))


def _root_mean_square(array: mx.array) -> mx.array:
    """Returns the RMS, summed row by row: in MLX one sum is off by 3e-4 for a million values."""
    return mx.sqrt(mx.square(array.reshape(array.shape or (1,))).mean(axis=-1).mean())
