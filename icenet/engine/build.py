"""Chooses the device and builds the model, MLX. The mirror is `icenet_torch/engine/build.py`."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.core.config import Config
from icenet.core.errors import BackendError
from icenet.core.models.build import new_model
from icenet.models import MODELS, BaseModel
from icenet.nn.arithmetic import set_tf32


def choose_device(name: str) -> mx.Device:
    """Returns the device of a name: auto, cpu, gpu, cuda or cuda:N.

    auto is a GPU if there is one. gpu and cuda are the same to MLX.

    Raises:
        BackendError: There is no such device.
    """
    if name in ("cpu", "auto") and not (name == "auto" and mx.is_available(mx.gpu)):
        return mx.Device(mx.cpu)
    if name == "mps":
        raise BackendError("device mps is PyTorch's name for the GPU: with MLX use --device gpu, or --backend torch")
    index = int(name.partition(":")[2] or 0)
    if not mx.is_available(mx.Device(mx.gpu, index)):
        raise BackendError(f"MLX finds no device {name}: use --device cpu, and see icenet doctor")
    return mx.Device(mx.gpu, index)


def build_model(config: Config, device: str = "auto", *, seed: int | None) -> BaseModel:
    """Returns a new model that computes on a device. MLX's default device stays as it is.

    Args:
        config: The configuration.
        device: Name of the device (see `choose_device`).
        seed: Seed of the initial weights. None leaves them undefined, for a model whose weights are then loaded.

    Raises:
        BackendError: There is no such device, or `allow_tf32` contradicts this process (see `set_tf32`).
    """
    chosen = choose_device(device)
    set_tf32(chosen, config.allow_tf32)
    with mx.stream(chosen):
        model: BaseModel = new_model(config.model, MODELS, "mlx", seed)
    model.device, model.allow_tf32 = chosen, config.allow_tf32
    return model


def meta_model(config: Config) -> BaseModel:
    """Returns a model without parameter values, of any size: MLX's arrays are lazy, and these are never computed."""
    return new_model(config.model, MODELS, "mlx")
