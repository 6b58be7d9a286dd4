"""PyTorch's optimizers, and the two that it lacks or computes in bf16. The mirror is `icenet/engine/optimizers.py`.

Each class updates the parameters of one group; `Optimizer` combines all groups. Everything is computed in the
parameters' dtype, so that a model in float64 is a reference. docs/optimizers.md has the formulas and their sources.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn, optim

from icenet.core.config import TrainingConfig
from icenet.core.engine import optimizer
from icenet.core.engine.optimizer import OptimizerGroup, orthogonalize
from icenet.core.engine.parameter_groups import Group, momentum, muon_factor
from icenet_torch.nn.arrays import from_numpy, to_numpy

Parameters = list[nn.Parameter]
State = dict[str, Tensor]
"""The arrays of one parameter by slot."""


class _Method(optim.Optimizer):
    """Base class of the methods: slots of the state, their initial values, and the scalars of a step."""

    slots: ClassVar[dict[str, str]]
    """Canonical slot names, which are PyTorch's own."""
    # without PyTorch's decorators, which import the compiler at their first call and take seconds for that
    add_param_group = inspect.unwrap(optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(optim.Optimizer.zero_grad)

    def init_single(self, parameter: nn.Parameter) -> State:
        """Returns the initial state of a parameter."""
        return {slot: torch.zeros_like(parameter) for slot in self.slots}

    def prepare(self, step: int, learning_rate: float) -> None:
        """Sets the learning rate and the number of step 0, 1, ..."""
        for group in self.param_groups:
            group["lr"] = learning_rate
        for state in self.state.values():
            if "step" in state:
                state["step"].fill_(step)


def _step_of(method: type[optim.Optimizer]) -> Any:
    """Returns the step of a class of PyTorch without its decorator, for the reason given in `_Method`."""
    return torch.no_grad()(inspect.unwrap(method.step))


class SGD(_Method, optim.SGD):
    """PyTorch's SGD with momentum (also Nesterov's), without dampening; weight decay is added to the gradient."""

    slots: ClassVar = {"momentum_buffer": "momentum_buffer"}
    step = _step_of(optim.SGD)

    def __init__(self, parameters: Parameters, training: TrainingConfig, group: Group) -> None:
        mass = momentum(training)
        nesterov = training.nesterov and mass > 0
        super().__init__(parameters, training.learning_rate, mass, 0, group.weight_decay, nesterov)

    def init_single(self, parameter: nn.Parameter) -> State:
        return super().init_single(parameter) if self.defaults["momentum"] > 0 else {}


def _is_dense(parameter: Tensor) -> bool:
    """Returns whether the values fill the memory, in any order of the axes: then arrays like it have its strides."""
    return torch.empty_like(parameter, device="meta").stride() == parameter.stride()


class _AdamMethod(_Method):
    """What Adam and AdamW share: their state, and PyTorch's fused kernel on CUDA."""

    slots: ClassVar = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}

    def __init__(self, parameters: Parameters, training: TrainingConfig, group: Group) -> None:
        betas = (training.beta1, training.beta2)
        # Its numbers are as exact as those of the other implementations, which pass over the arrays several times.
        fused = all(p.device.type == "cuda" and _is_dense(p) for p in parameters)
        super().__init__(  # type: ignore[call-arg]
            parameters, training.learning_rate, betas, training.eps, group.weight_decay, fused=fused or None
        )
        # one array holds the number of the step for all parameters: setting it is one kernel
        self._steps = torch.zeros(len(parameters), device=parameters[0].device if fused else "cpu")
        self._places = {id(parameter): place for place, parameter in enumerate(parameters)}

    def init_single(self, parameter: nn.Parameter) -> State:
        return {**super().init_single(parameter), "step": self._steps[self._places[id(parameter)]]}

    def prepare(self, step: int, learning_rate: float) -> None:
        for group in self.param_groups:
            group["lr"] = learning_rate
        self._steps.fill_(step)


class Adam(_AdamMethod, optim.Adam):
    """PyTorch's Adam; weight decay is added to the gradient."""

    step = _step_of(optim.Adam)


class AdamW(_AdamMethod, optim.AdamW):
    """Adam with decoupled weight decay."""

    step = _step_of(optim.AdamW)


class Adafactor(_Method, optim.Adafactor):
    """PyTorch's Adafactor: the learning rate is an upper limit, relative to the RMS of the parameter.

    The first epsilon is that of fp32 in float64, too: otherwise the reference would use another formula.
    """

    slots: ClassVar = {name: name for name in ("row_var", "col_var", "variance")}
    step = _step_of(optim.Adafactor)
    EPS: ClassVar = (2.0**-23, 1e-3)
    """The lower limits of a gradient's mean square in a row, and of a parameter's RMS."""

    def __init__(self, parameters: Parameters, training: TrainingConfig, group: Group) -> None:
        super().__init__(parameters, training.learning_rate, eps=self.EPS, weight_decay=group.weight_decay)

    def init_single(self, parameter: nn.Parameter) -> State:
        step = torch.zeros((), dtype=torch.float32)
        if parameter.ndim < 2:
            return {"variance": torch.zeros_like(parameter), "step": step}
        row = parameter.detach()[..., :1]
        column = parameter.detach()[..., :1, :]
        return {"row_var": torch.zeros_like(row), "col_var": torch.zeros_like(column), "step": step}


class Lion(_Method):
    """Lion (Chen et al., 2023), which PyTorch lacks; each product is rounded as in MLX."""

    slots: ClassVar = {"exp_avg": "exp_avg"}

    def __init__(self, parameters: Parameters, training: TrainingConfig, group: Group) -> None:
        self.betas = (training.beta1, training.beta2)
        super().__init__(parameters, {"lr": training.learning_rate, "weight_decay": group.weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        beta1, beta2 = self.betas
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, m = parameter.grad, self.state[parameter]["exp_avg"]
                direction = (beta1 * m + (1 - beta1) * gradient).sign_()
                m.mul_(beta2).add_((1 - beta2) * gradient)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * direction)


class Muon(_Method):
    """Muon (Jordan, 2024) in the parameters' dtype, with steps of AdamW's size (see `muon_factor`).

    `torch.optim.Muon` (from PyTorch 2.9) orthogonalizes in bf16, which no reference can reproduce.
    """

    slots: ClassVar = {"momentum_buffer": "momentum_buffer"}

    def __init__(self, parameters: Parameters, training: TrainingConfig, group: Group) -> None:
        self.momentum, self.nesterov = momentum(training), training.nesterov
        super().__init__(parameters, {"lr": training.learning_rate, "weight_decay": group.weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        mass = self.momentum
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, v = parameter.grad, self.state[parameter]["momentum_buffer"]
                v.mul_(mass).add_((1 - mass) * gradient)
                update = orthogonalize(mass * v + (1 - mass) * gradient if self.nesterov else v, frobenius_norm)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * muon_factor(parameter.shape) * update)


METHODS: dict[str, Any] = {
    "sgd": SGD,
    "adam": Adam,
    "adamw": AdamW,
    "adafactor": Adafactor,
    "lion": Lion,
    "muon": Muon,
}
"""Optimizers by the value of `training.optimizer`."""


def frobenius_norm(matrix: Tensor) -> Tensor:
    """Returns the norms of matrices."""
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)


class Optimizer(optimizer.Optimizer):
    """See `icenet.core.engine.optimizer.Optimizer`."""

    def __init__(self, training: TrainingConfig, model: Any) -> None:
        self.parameters = {path: p for path, p in model.named_parameters() if p.requires_grad}
        super().__init__(training, model, self.parameters)

    def update(self, gradients: Mapping[str, Tensor]) -> None:
        for path, parameter in self.parameters.items():
            gradient = gradients[path]
            if gradient.stride() != parameter.stride():  # fused kernels read all arrays in the order of memory
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        for group in self.groups:
            group.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Removes the gradients of all parameters, or sets them to zero."""
        for group in self.groups:
            group.optimizer.zero_grad(set_to_none)

    def _new_group(
        self, training: TrainingConfig, group: Group, variant: Any, parameters: dict[str, nn.Parameter]
    ) -> OptimizerGroup:
        own = METHODS[group.method](list(parameters.values()), training, group)
        for parameter in parameters.values():
            # PyTorch initializes the state in its first step, which need not be step 0: fp16 may skip some
            own.state[parameter] = own.init_single(parameter)
        return OptimizerGroup(own, group.lr_scale, {path: own.state[p] for path, p in parameters.items()})

    def _to_canonical(self, path: str, array: Tensor) -> Tensor:
        return array

    def _to_numpy(self, array: Tensor) -> np.ndarray:
        return to_numpy(array).copy()

    @torch.no_grad()
    def _set_slot(self, path: str, state: State, slot: str, values: np.ndarray) -> None:
        state[slot].copy_(from_numpy(values))
