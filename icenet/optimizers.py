"""MLX's optimizers, where their conventions differ from PyTorch's. The mirror is `icenet_torch/optimizers.py`."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from icenet.core.config import TrainingConfig
from icenet.core.schedule import adam_corrections

SLOTS = {"m": "exp_avg", "v": "exp_avg_sq"}
"""MLX's names of an optimizer's state and the canonical ones, which are PyTorch's."""


class AdamW(optim.AdamW):
    """MLX's AdamW with its bias corrections computed on the host in float64.

    MLX computes 1 - beta^t in fp32, which is off by 3e-5 in the first steps. Only matrices decay.
    """

    def __init__(self, training: TrainingConfig) -> None:
        super().__init__(
            learning_rate=training.learning_rate,
            betas=[training.beta1, training.beta2],
            eps=training.eps,
            weight_decay=training.weight_decay,
        )

    def prepare(self, step: int, learning_rate: float) -> None:
        """Sets the scalars of step 0, 1, ...; called before `update`."""
        first, second = adam_corrections(step, *self.betas)
        self.learning_rate = learning_rate
        self.state["step_size"] = mx.array(learning_rate / first, mx.float32)
        self.state["root_correction"] = mx.array(second**0.5, mx.float32)
        self.state["shrink"] = mx.array(1 - learning_rate * self.weight_decay, mx.float32)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        beta1, beta2 = self.betas
        state["m"] = m = beta1 * state["m"] + (1 - beta1) * gradient
        state["v"] = v = beta2 * state["v"] + (1 - beta2) * mx.square(gradient)
        if parameter.ndim >= 2:
            parameter = parameter * self.state["shrink"]
        denominator = mx.sqrt(v) / self.state["root_correction"] + self.eps
        return parameter - self.state["step_size"] * (m / denominator)


OPTIMIZERS = {"adamw": AdamW}


def state_arrays(optimizer: optim.Optimizer, paths: set[str]) -> dict[str, mx.array]:
    """The optimizer's arrays by canonical name, `PATH.exp_avg`."""
    arrays = {}
    for name, array in tree_flatten(optimizer.state):
        path, _, slot = name.rpartition(".")
        if path in paths:
            arrays[f"{path}.{SLOTS[slot]}"] = array
    return arrays


def set_state_arrays(optimizer: optim.Optimizer, arrays: dict[str, mx.array]) -> None:
    """Puts arrays by canonical name in the optimizer's state, in place: a compiled step holds on to it."""
    own = {canonical: slot for slot, canonical in SLOTS.items()}
    for name, array in arrays.items():
        path, _, slot = name.rpartition(".")
        place = optimizer.state
        for part in path.split("."):
            place = place[int(part)] if isinstance(place, list) else place[part]
        place[own[slot]] = array
