"""PyTorch's optimizers, as a run's configuration asks for them. The mirror is `icenet/optimizers.py`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn, optim

from icenet.core.config import TrainingConfig

SLOTS = ("exp_avg", "exp_avg_sq")
"""The canonical names of an optimizer's state, which are PyTorch's."""


class AdamW(optim.AdamW):
    """PyTorch's AdamW. Only matrices decay."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], training: TrainingConfig) -> None:
        matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
        vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
        super().__init__(
            [
                {"params": matrices, "weight_decay": training.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            eps=training.eps,
        )
        # PyTorch makes the state at the first step taken, which need not be step 0: fp16 may skip some
        zeros = {f"{path}.{slot}": torch.zeros_like(p) for path, p in parameters.items() for slot in SLOTS}
        set_state_arrays(self, parameters, zeros)

    def prepare(self, step: int, learning_rate: float) -> None:
        """Sets the scalars of step 0, 1, ...; called before `step`."""
        for group in self.param_groups:
            group["lr"] = learning_rate
            for parameter in group["params"]:
                self.state[parameter]["step"].fill_(step)


OPTIMIZERS = {"adamw": AdamW}


def state_arrays(optimizer: optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's arrays by canonical name, `PATH.exp_avg`."""
    return {f"{path}.{slot}": optimizer.state[p][slot] for path, p in parameters.items() for slot in SLOTS}


def set_state_arrays(
    optimizer: optim.Optimizer, parameters: Mapping[str, nn.Parameter], arrays: Mapping[str, Tensor]
) -> None:
    """Puts arrays by canonical name in the optimizer's state."""
    for path, parameter in parameters.items():
        # a copy: the optimizer works in place, and an array may be a read-only view of a file
        state = {slot: arrays[f"{path}.{slot}"].to(parameter, copy=True) for slot in SLOTS}
        optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), **state}
