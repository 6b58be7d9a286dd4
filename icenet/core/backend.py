"""The backend flag: from a name to an Engine. The only place that imports a backend, by name and late.

A backend is a package with the modules `models`, `nn`, `engine`, `probe` and `facts`; an Engine is its hands:
it owns one model and its optimizer and takes and gives numpy.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from icenet.core import custom, processes
from icenet.core.config import Config, ModelConfig
from icenet.core.errors import BackendError, ConfigError, DataError, IceNetError

PACKAGES = {"mlx": "icenet", "torch": "icenet_torch"}
_INSTALL = {
    "mlx": "pip install 'icenet[cpu]' on Linux, 'icenet[cuda]' with an NVIDIA GPU, 'icenet' on a Mac",
    "torch": "pip install 'icenet[torch]'",
}

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
    world: processes.World
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


def resolve(name: str, blas: str = "auto") -> str:
    """The backend that a flag means: `auto` is mlx where it runs, else torch.

    `blas` is the configuration's choice of a BLAS for MLX on a Linux CPU; ICENET_BLAS goes before it.

    Raises:
        BackendError: the backend, or with `auto` any, is not installed or does not start.
    """
    if blas != "auto":
        os.environ.setdefault("ICENET_BLAS", blas)
    if name != "auto":
        _import(name)
        return name
    reasons = []
    for candidate in PACKAGES:
        try:
            _import(candidate)
            return candidate
        except BackendError as error:
            reasons.append(str(error))
    raise BackendError("no backend runs here. " + "; ".join(reasons))


def choose(config: Config, backend: str | None = None) -> str:
    """The backend for a configuration: what is asked for, else what it says.

    `auto` takes one that a model of the user's own is written for.
    """
    name = backend or config.backend
    if name != "auto" or not custom.is_custom(config.model.type):
        return resolve(name, config.blas)
    reasons: list[IceNetError] = []
    for candidate in PACKAGES:
        try:
            resolve(candidate, config.blas)
            custom.model_class(config.model.type, candidate)
            return candidate
        except BackendError as error:
            reasons.append(error)
    raise reasons[0]


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


def installed(name: str) -> bool:
    """Whether a backend's framework can be found, without importing it."""
    return importlib.util.find_spec(name) is not None


def _import(name: str) -> None:
    if name not in PACKAGES:
        raise BackendError(f"no backend {name!r}: mlx, torch or auto")
    framework = "mlx.core" if name == "mlx" else "torch"
    if not installed(name):
        others = [other for other in PACKAGES if other != name and installed(other)]
        instead = f"; or choose --backend {others[0]}" if others else ""
        raise BackendError(f"backend {name} is not installed: {_INSTALL[name]}{instead}")
    try:
        if name == "mlx":
            importlib.import_module("icenet.blas")
        importlib.import_module(framework)
    except (ImportError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackendError(f"backend {name} is installed but does not start ({first}); see icenet doctor") from None


def module(name: str, part: str) -> ModuleType:
    """A module of a backend's package: `module("torch", "engine")` is `icenet_torch.engine`."""
    _import(name)
    return importlib.import_module(f"{PACKAGES[name]}.{part}")


def engine(
    config: Config, backend: str | None = None, device: str | None = None, *, dtype: str = "float32"
) -> Engine:
    """An Engine for a configuration; `backend` and `device` override what it says.

    `dtype` is that of the parameters: float32, or float64 for the reference of parity (PyTorch only).
    """
    name = choose(config, backend)
    made: Engine = module(name, "engine").Engine(config, device or config.device, dtype)
    return made


def exact_products() -> None:
    """Has MLX multiply fp32 matrices in full, for comparisons; no effect once MLX is imported.

    On CUDA and on M5 chips MLX's default is TF32, which has 10 bits of mantissa. PyTorch's default is full
    precision for products; for convolutions on CUDA the PyTorch engine asks for it where this was called.
    """
    if "mlx.core" not in sys.modules:
        os.environ["MLX_ENABLE_TF32"] = "0"


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
