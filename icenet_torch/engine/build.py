"""Chooses the device and builds the model, PyTorch. The mirror is `icenet/engine/build.py`."""

from __future__ import annotations

import torch

from icenet.core.config import Config
from icenet.core.config.custom import is_custom
from icenet.core.errors import BackendError
from icenet.core.models.build import new_model
from icenet_torch.models import MODELS, BaseModel


def choose_device(name: str) -> torch.device:
    """Returns the device of a name: auto, cpu, gpu, mps, cuda or cuda:N.

    auto is MPS, otherwise CUDA, otherwise the CPU. gpu is MPS or CUDA.

    Raises:
        BackendError: There is no such device.
    """
    if name == "auto":
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = "mps" if torch.backends.mps.is_available() else "cuda"
    device = torch.device(gpu if name == "gpu" else name)
    counts = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}
    if (device.index or 0) >= counts[device.type]:
        raise BackendError(f"PyTorch finds no device {name}: use --device cpu, and see icenet doctor")
    return device


def build_model(config: Config, device: str = "auto", *, seed: int | None) -> BaseModel:
    """Returns a new model on a device.

    Args:
        config: The configuration.
        device: Name of the device (see `choose_device`).
        seed: Seed of the initial weights. None leaves them undefined, for a model whose weights are then loaded.
    """
    chosen = choose_device(device)
    with torch.device("cpu"):  # not torch.set_default_device: the initial values are those of the CPU
        model: BaseModel = new_model(config.model, MODELS, "torch", seed)
    model = model.to(chosen)
    if chosen.type == "cuda" and not is_custom(config.model.type):
        # the format of the images (see `to_channels_first`): otherwise each convolution would copy its weight to it
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.allow_tf32 = config.allow_tf32
    return model


def meta_model(config: Config) -> BaseModel:
    """Returns a model without parameter values, of any size."""
    with torch.device("meta"):
        return new_model(config.model, MODELS, "torch")
