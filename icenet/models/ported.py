"""A PyTorch module with a port as a model, MLX: the port. The mirror is `icenet_torch/models/ported.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.core.config import ModelConfig, custom
from icenet.core.models import ports
from icenet.core.models.ported import PortedBase, logits_of
from icenet.core.weights import files
from icenet.models.base import BaseModel
from icenet.porting.load import to_array


class PortedModel(PortedBase, BaseModel):
    """A module of the user. `net` is its port."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.net = _module(config)

    def forward(self, inputs: mx.array) -> mx.array:
        if inputs.ndim == 4 and not self.is_channels_last:
            inputs = inputs.transpose(0, 3, 1, 2)
        return logits_of(self.net(inputs), self.config, mx.array)

    @property
    def is_channels_last(self) -> bool:
        """Whether the port takes images `[B, H, W, C]`."""
        return bool(ports.read_config(Path(self.config.port))["layout"] == "nhwc")


def _module(config: Any) -> nn.Module:
    """Returns the module of a port, whose constants and buffers that are not saved have their values."""
    folder = Path(config.port)
    module: nn.Module = getattr(custom.port_module(config), ports.read_config(folder)["class"])()
    fixed = [place.name for place in ports.read_config(folder)["weights"].values() if not place.is_saved]
    arrays = files.read(folder / "weights.safetensors") if fixed else {}
    for path in fixed:
        *parents, name = path.split(".")
        holder: Any = module
        for part in parents:
            holder = holder[int(part)] if isinstance(holder, list) else holder[part]
        if isinstance(holder, nn.Module):  # an attribute of Python, which MLX takes for no parameter
            del holder[name]
            object.__setattr__(holder, name, to_array(arrays[path]))
    return module
