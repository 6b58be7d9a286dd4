"""The port of a model that is trained (`icenet.models.ported`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.core.config import custom
from icenet.core.models import port_weights
from icenet.core.models.ported import logits_of
from icenet.core.weights import files
from icenet.porting.layers import accelerate
from icenet.porting.load import to_array

_LAYOUT = "_icenet_layout"
"""The attribute of a port that holds the layout of its images, nchw or nhwc."""


def module(config: Any) -> nn.Module:
    """Returns the module of a port, whose constants and buffers that are not saved have their values."""
    folder, source = Path(config.port), custom.port_module(config)
    described = port_weights.read_config(folder)
    found: nn.Module = getattr(source, described["class"])()
    object.__setattr__(found, _LAYOUT, described["layout"])
    port_weights.mark(found, described["weights"])
    fixed = [place.name for place in described["weights"].values() if not place.is_saved]
    arrays = files.read(folder / "weights.safetensors") if fixed else {}
    for path in fixed:
        *parents, name = path.split(".")
        holder: Any = found
        for part in parents:
            holder = holder[int(part)] if isinstance(holder, list) else holder[part]
        del holder[name]  # an attribute of Python, which MLX takes for no parameter
        object.__setattr__(holder, name, to_array(arrays[path]))
    return accelerate(found)


def logits(net: nn.Module, inputs: mx.array, config: Any) -> mx.array:
    """Returns the logits of a port, for token ids or images `[B, H, W, C]`."""
    if inputs.ndim == 4 and getattr(net, _LAYOUT) == "nchw":
        inputs = inputs.transpose(0, 3, 1, 2)
    found: mx.array = logits_of(net(inputs), config, mx.array)
    return found


def code(model: Any) -> str:
    """Returns the module of Python that defines the model: that of the port is no code of the user."""
    return type(model).__module__
