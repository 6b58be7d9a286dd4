"""The port of a model that is trained (`icenet.models.ported`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.core.config import custom
from icenet.core.models import ports
from icenet.core.models.ported import logits_of
from icenet.core.weights import files
from icenet.porting.layers import accelerate
from icenet.porting.load import to_array


def module(config: Any) -> nn.Module:
    """Returns the module of a port, whose constants and buffers that are not saved have their values."""
    folder = Path(config.port)
    found: nn.Module = getattr(custom.port_module(config), ports.read_config(folder)["class"])()
    fixed = [place.name for place in ports.read_config(folder)["weights"].values() if not place.is_saved]
    arrays = files.read(folder / "weights.safetensors") if fixed else {}
    for path in fixed:
        *parents, name = path.split(".")
        holder: Any = found
        for part in parents:
            holder = holder[int(part)] if isinstance(holder, list) else holder[part]
        if isinstance(holder, nn.Module):  # an attribute of Python, which MLX takes for no parameter
            del holder[name]
            object.__setattr__(holder, name, to_array(arrays[path]))
    return accelerate(found)


def logits(net: nn.Module, inputs: mx.array, config: Any) -> mx.array:
    """Returns the logits of a port, for token ids or images `[B, H, W, C]`."""
    if inputs.ndim == 4 and ports.read_config(Path(config.port))["layout"] == "nchw":
        inputs = inputs.transpose(0, 3, 1, 2)
    found: mx.array = logits_of(net(inputs), config, mx.array)
    return found


def code(model: Any) -> str:
    """Returns the module of Python that defines the model: that of the port is no code of the user."""
    return type(model).__module__
