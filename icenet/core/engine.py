"""The engine: one model and its optimizer on one backend, numpy in and out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from icenet.core.config import Config, ModelConfig, custom
from icenet.core.distributed import processes
from icenet.core.errors import ConfigError, DataError

Batch = dict[str, NDArray[Any]]


class StepResult(NamedTuple):
    """What a training step measured."""

    loss: float
    grad_norm: float
    """Of all gradients together, before any clipping."""
    finite: bool
    stop: str | None = None
    """What asks the processes to stop, where there are several: all hear of it at the same step."""
    largest: tuple[tuple[str, float], ...] = ()
    """Where not finite: the parameters with the largest gradients and their norms."""


LARGEST = 3
"""How many parameters `StepResult.largest` names."""


def step_result(loss: float, norm: float, stop: str | None, norms: Callable[[], Mapping[str, float]]) -> StepResult:
    """The result of a step; `norms` gives the norm of each gradient, and is asked only where one is not finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return StepResult(loss, norm, True, stop)
    ranked = sorted(norms().items(), key=lambda item: (not math.isnan(item[1]), -item[1]))
    return StepResult(loss, norm, False, stop, tuple(ranked[:LARGEST]))


def split_averages(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The averaged weights by path, and the rest, of an optimizer's state by `PATH.SLOT`."""
    averages = {name.removesuffix(".ema"): array for name, array in state.items() if name.endswith(".ema")}
    return averages, {name: array for name, array in state.items() if not name.endswith(".ema")}


def micro_batches(batch: Batch, number: int, rank: int = 0, size: int = 1) -> list[tuple[Batch, range, float]]:
    """A process's rows of a batch in consecutive parts: each with its rows and its share of all labels that count.

    The losses of the parts, each a mean over its own labels, add up to the whole's when weighted by the shares.
    """
    own = processes.own_rows(len(batch["labels"]), rank, size)
    if number == size == 1:
        return [(batch, own, 1.0)]
    counted = max(int((batch["labels"] >= 0).sum()), 1)
    edges = [own.start + len(own) * index // number for index in range(number + 1)]
    parts = []
    for first, last in pairwise(edges):
        part = {name: array[first:last] for name, array in batch.items()}
        parts.append((part, range(first, last), int((part["labels"] >= 0).sum()) / counted))
    return parts


class Evaluation(NamedTuple):
    """What the evaluation of a batch measured."""

    loss: float
    """The mean, in nats."""
    labels: int
    """How many were counted."""
    correct: int | None
    """Rows classified right, where labels are `[B]`; None for tokens."""


class Engine(Protocol):
    """One model and its optimizer on one backend and device. Arrays are numpy, weights canonical.

    A batch holds `inputs` and `labels`: tokens int32 `[B, T]` and `[B, T]`, or images float32 `[B, H, W, C]`
    and classes int32 `[B]`.
    """

    backend: ClassVar[str]
    device: str
    config: Config
    model: Any
    process_group: processes.ProcessGroup
    """The processes that train together; each is given every batch to train on whole, and takes its rows."""

    def train_step(self, batch: Batch, step: int, learning_rate: float, loss_scale: float = 1.0) -> Any:
        """Submits one optimizer step; gives a handle for `read`. Step 0 is the first."""

    def read(self, handle: Any) -> StepResult:
        """Waits for a step."""

    def evaluate(self, batch: Batch) -> Evaluation:
        """The loss of a batch in evaluation mode, and how many of its rows are classified right.

        With `training.ema_decay` it is that of the averaged weights. Of several processes each is given its own rows.
        """

    def forward(self, batch: Batch) -> NDArray[Any]:
        """The model's output in evaluation mode."""

    def gradients(self, batch: Batch, step: int = 0) -> tuple[float, dict[str, NDArray[Any]]]:
        """The mean loss and the gradient of every parameter, unclipped, with the dropout masks of a step.

        Weights and running statistics stay as they are. As in a training step the batch is taken in
        `training.gradient_accumulation` parts.
        """

    def apply_gradients(self, gradients: dict[str, NDArray[Any]], step: int, learning_rate: float) -> None:
        """One optimizer step with gradients from elsewhere, unclipped."""

    def weights(self) -> dict[str, NDArray[Any]]: ...

    def set_weights(self, weights: dict[str, NDArray[Any]]) -> None: ...

    def optimizer_state(self) -> dict[str, NDArray[Any]]:
        """The optimizer's arrays by `PATH.SLOT`, in PyTorch's names and layouts; averaged weights are `PATH.ema`."""

    def set_optimizer_state(self, state: dict[str, NDArray[Any]]) -> None: ...


def new_model(config: ModelConfig, models: Mapping[str, Callable[..., Any]], backend: str, seed: int | None) -> Any:
    """A model of a backend, from its families or from the user's file; without a seed, its values are undefined."""
    if not custom.is_custom(config.type):
        return models[config.type](config, seed=seed)
    made = custom.model_class(config.type, backend)
    try:
        model = made(config)
    except (AttributeError, TypeError, ValueError) as error:  # an option that is missing, or of a wrong type
        raise ConfigError(f"{config.type} cannot be made from its options under model: {error}") from error
    if seed is not None:
        model.init_weights(seed)
    return model


def check_ids(batch: Batch, vocab_size: int) -> None:
    """Refuses ids outside the vocabulary: MLX reads past its tables without a word."""
    for name, array in batch.items():
        if array.size and np.issubdtype(array.dtype, np.integer) and name in ("inputs", "labels"):
            least, most = int(array.min()), int(array.max())
            if most >= vocab_size or (name == "inputs" and least < 0):
                wrong = most if most >= vocab_size else least
                raise DataError(
                    f"{name} hold the id {wrong}, outside the vocabulary (0 to {vocab_size - 1}); "
                    "raise model.vocab_size or change data.tokenizer"
                )
