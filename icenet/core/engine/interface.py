"""What a backend's engine defines: its attributes, and the methods that `Engine` calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from icenet.core.engine.batches import Array, Batch
from icenet.core.engine.ema import WeightAverage
from icenet.core.engine.optimizer import Optimizer


class EngineInterface(ABC):
    """The part of an engine that each backend implements.

    A backend's constructor takes `(config, device, dtype)`. It calls that of `Engine`, then `_set_model`, and sets
    `device`, `optimizer`, `average`, `compiles` and `_trainable`.

    Attributes:
        backend: mlx or torch.
        detaches: What of the framework ends the gradient of an array, for messages.
        environment: Environment variables of the framework for training, unless they are set.
        nn: The backend's `nn` package, whose functions have the same names and meaning on both backends.
        device: The device's name in the backend.
        model: A `BaseModel` of the backend.
        optimizer: The optimizer of the trainable parameters.
        average: The moving average of the weights with `training.ema_decay`, otherwise None.
        compiles: Whether the step is compiled.
    """

    backend: ClassVar[str]
    detaches: ClassVar[str]
    nn: ClassVar[ModuleType]
    environment: ClassVar[Mapping[str, str]] = {}
    device: str
    model: Any
    optimizer: Optimizer
    average: WeightAverage | None
    compiles: bool
    _trainable: list[str]
    """Paths of the parameters that are trained, in the order of `_norms`."""

    @abstractmethod
    def _normalize(self, pixels: Array, scale: NDArray[np.float32], shift: NDArray[np.float32]) -> Array:
        """Returns value * scale - shift of images on the device; scale and shift are those of the channels."""

    @abstractmethod
    def _to_canonical(self, arrays: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
        """Returns parameters or gradients by path as numpy arrays in PyTorch's layouts."""

    @abstractmethod
    def _from_canonical(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Array]:
        """Returns canonical arrays as the backend's; the inverse of `_to_canonical`."""

    @abstractmethod
    def _to_device(self, array: NDArray[Any]) -> Array:
        """Returns one array of a batch, or dropout keys (uint32), on the device."""

    @abstractmethod
    def _to_float_numpy(self, array: Array) -> NDArray[Any]:
        """Returns an output of the model as numpy; half precision as float32."""

    @abstractmethod
    def _to_full_precision(self, array: Array) -> Array:
        """Returns an array of half precision as float32, and others as they are."""

    @abstractmethod
    def _seed_generator(self, seed: int) -> None:
        """Seeds the framework's own random generator of the process, for `rng: native`."""

    @abstractmethod
    def _accumulate(self, batch: Batch, step: int, loss_scale: float = 1.0) -> tuple[Array, dict[str, Array]]:
        """Returns the mean loss of this process's rows and the gradients summed over the processes, by path.

        The forward and backward passes of all of `_micro_batches`, scaled by `loss_scale` in the backward pass only.
        """

    @abstractmethod
    def _update(self, gradients: dict[str, Array], norm: Array, average_weight: float) -> None:
        """Clips the gradients as `training` describes, and updates parameters, optimizer state and weight average."""

    @abstractmethod
    def _outputs(self, arrays: Mapping[str, Array], as_loss: bool = False) -> Array:
        """Returns the output of the model for a batch on the device, or the mean loss that the model computes."""

    @abstractmethod
    def _predict(self, arrays: Mapping[str, Array], as_loss: bool = False) -> Array:
        """Returns `_outputs` without gradients, compiled if the step is."""

    def _submit(self, *results: Array) -> Any:
        """Starts the computation of results and new state on a lazy framework. Returns a handle for `_wait`."""
        return results

    def _wait(self, handle: Any) -> tuple[Array, Array, Array]:
        """Returns loss, norm and norms that were passed to `_submit`, when they are computed."""
        loss, norm, norms = handle
        return loss, norm, norms
