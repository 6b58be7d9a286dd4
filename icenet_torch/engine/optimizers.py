"""PyTorch's optimizers, and the two it lacks or computes in bf16. The mirror is `icenet/engine/optimizers.py`.

Each class fits the parameters of one group, `Optimizer` all of them. docs/training.md has the formulas and their
sources. Everything is computed in the parameters' dtype, so that a model in float64 is a reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn, optim

from icenet.core.config import TrainingConfig
from icenet.core.training.parameter_groups import Group, assign, check_slots, gather, momentum, muon_factor
from icenet_torch.models import BaseModel

Parameters = list[nn.Parameter]
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""The coefficients of Muon's polynomial (Jordan, 2024)."""


class SGD(optim.SGD):
    """PyTorch's SGD: with momentum and Nesterov's, without dampening, the decay added to the gradient."""

    def __init__(self, parameters: Parameters, training: TrainingConfig, group: Group) -> None:
        mass = momentum(training)
        nesterov = training.nesterov and mass > 0
        super().__init__(parameters, training.learning_rate, mass, 0, group.weight_decay, nesterov)

    def init_single(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(parameter)} if self.defaults["momentum"] > 0 else {}


class Adam(optim.Adam):
    """PyTorch's Adam, the decay added to the gradient."""

    def __init__(self, parameters: Parameters, training: TrainingConfig, group: Group) -> None:
        betas = (training.beta1, training.beta2)
        super().__init__(parameters, training.learning_rate, betas, training.eps, group.weight_decay)

    def init_single(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {slot: torch.zeros_like(parameter) for slot in ("exp_avg", "exp_avg_sq")}


class AdamW(optim.AdamW):
    """The same, the decay beside the gradient."""

    def __init__(self, parameters: Parameters, training: TrainingConfig, group: Group) -> None:
        betas = (training.beta1, training.beta2)
        super().__init__(parameters, training.learning_rate, betas, training.eps, group.weight_decay)

    def init_single(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {slot: torch.zeros_like(parameter) for slot in ("exp_avg", "exp_avg_sq")}


class Adafactor(optim.Adafactor):
    """PyTorch's Adafactor: the learning rate is an upper limit, in units of the parameter's size.

    The first epsilon is fp32's in float64 too, or the reference would follow another formula.
    """

    EPS: ClassVar = (2.0**-23, 1e-3)
    """The least mean square of a gradient in a row, and the least size of a parameter."""

    def __init__(self, parameters: Parameters, training: TrainingConfig, group: Group) -> None:
        super().__init__(parameters, training.learning_rate, eps=self.EPS, weight_decay=group.weight_decay)

    def init_single(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if parameter.ndim < 2:
            return {"variance": torch.zeros_like(parameter)}
        row = parameter.detach()[..., :1]
        column = parameter.detach()[..., :1, :]
        return {"row_var": torch.zeros_like(row), "col_var": torch.zeros_like(column)}


class Lion(optim.Optimizer):
    """Lion (Chen et al., 2023), which PyTorch lacks; each product is rounded where MLX rounds it."""

    def __init__(self, parameters: Parameters, training: TrainingConfig, group: Group) -> None:
        self.betas = (training.beta1, training.beta2)
        super().__init__(parameters, {"lr": training.learning_rate, "weight_decay": group.weight_decay})

    def init_single(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        beta1, beta2 = self.betas
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, m = parameter.grad, self.state[parameter]["exp_avg"]
                direction = (beta1 * m + (1 - beta1) * gradient).sign_()
                m.mul_(beta2).add_((1 - beta2) * gradient)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * direction)


class Muon(optim.Optimizer):
    """Muon (Jordan, 2024) in the parameters' dtype, with steps of AdamW's size (see `muon_factor`).

    `torch.optim.Muon` (from PyTorch 2.9) orthogonalises in bf16, which no reference can follow.
    """

    def __init__(self, parameters: Parameters, training: TrainingConfig, group: Group) -> None:
        self.momentum, self.nesterov = momentum(training), training.nesterov
        super().__init__(parameters, {"lr": training.learning_rate, "weight_decay": group.weight_decay})

    def init_single(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        mass = self.momentum
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, v = parameter.grad, self.state[parameter]["momentum_buffer"]
                v.mul_(mass).add_((1 - mass) * gradient)
                update = orthogonalised(mass * v + (1 - mass) * gradient if self.nesterov else v)
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


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """A matrix `[rows, columns]` with all its singular values moved near to 1, in its own dtype.

    Newton and Schulz's iteration with the quintic of Jordan, "Muon: an optimizer for hidden layers in neural
    networks", 2024.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (torch.linalg.vector_norm(x) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if tall else x


class OptimizerGroup(NamedTuple):
    """One group: its optimizer, its learning rate in units of the schedule's, and its parameters by path."""

    optimizer: Any
    lr_scale: float
    parameters: dict[str, nn.Parameter]


class Optimizer:
    """The optimizers of all groups as one."""

    def __init__(self, name: str, groups: list[OptimizerGroup]) -> None:
        self.name = name
        self.groups = groups

    def prepare(self, step: int, learning_rate: float) -> None:
        """Sets the numbers of step 0, 1, ...; called before `step`."""
        for part in self.groups:
            for group in part.optimizer.param_groups:
                group["lr"] = learning_rate * part.lr_scale
            for state in part.optimizer.state.values():
                if "step" in state:
                    state["step"].fill_(step)

    def step(self) -> None:
        """Moves the model's parameters by their `grad`."""
        for part in self.groups:
            part.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.groups:
            part.optimizer.zero_grad(set_to_none)


def new_optimizer(training: TrainingConfig, model: BaseModel) -> Optimizer:
    """The optimizer of a run, its state zero.

    Raises:
        ConfigError: a pattern of `training.parameter_groups` fits no parameter.
    """
    parameters = {path: p for path, p in model.named_parameters() if p.requires_grad}
    shapes = {path: tuple(p.shape) for path, p in parameters.items()}
    assigned = assign(training, shapes, model.layer_kinds(), getattr(model.config, "vocab_size", None))
    groups = []
    for group, paths in gather(assigned).items():
        own = {path: parameters[path] for path in paths}
        optimizer = METHODS[group.method](list(own.values()), training, group)
        for parameter in own.values():
            # PyTorch makes the state at the first step taken, which need not be step 0: fp16 may skip some
            optimizer.state[parameter] = optimizer.init_single(parameter)
            if isinstance(optimizer, (Adam, AdamW, Adafactor)):
                optimizer.state[parameter]["step"] = torch.zeros((), dtype=torch.float32)
        groups.append(OptimizerGroup(optimizer, group.lr_scale, own))
    return Optimizer(training.optimizer, groups)


def state_arrays(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by canonical name (`PATH.exp_avg`), in PyTorch's layouts."""
    return {
        f"{path}.{slot}": tensor
        for part in optimizer.groups
        for path, parameter in part.parameters.items()
        for slot, tensor in part.optimizer.state[parameter].items()
        if slot != "step"
    }


@torch.no_grad()
def set_state_arrays(optimizer: Optimizer, arrays: Mapping[str, Tensor]) -> None:
    """Copies arrays by canonical name into the optimizer's state.

    Raises:
        CheckpointError: they are another optimizer's; nothing is changed then.
    """
    own = state_arrays(optimizer)
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    check_slots(wanted, {name: tuple(array.shape) for name, array in arrays.items()}, optimizer.name)
    for name, tensor in own.items():
        tensor.copy_(arrays[name])
