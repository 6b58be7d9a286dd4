"""A PyTorch module with a port as a model: the original on PyTorch, the port on MLX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from icenet.core.config import ModelConfig
from icenet.core.errors import UsageError
from icenet.core.models import port_weights
from icenet.core.porting.places import Places
from icenet.core.weights import files

NET = "net"
"""The attribute that holds the module; the names of the weights begin with it."""


class PortedBase:
    """The part of `PortedModel` that is the same on both backends.

    Attributes:
        config: The model section of the configuration, whose `port` is the folder of the port.
        net: The original, or its port.
    """

    config: Any
    net: Any

    def init_weights(self, seed: int = 0) -> None:
        """Sets the weights to those of the folder of the port; the seed has no effect."""
        model: Any = self
        if model.is_meta:
            return
        found, shapes = saved_weights(Path(self.config.port)), model.weight_shapes()
        model.set_weights({name: array for name, array in found.items() if name in shapes})


def saved_weights(folder: Path) -> dict[str, np.ndarray]:
    """Returns the canonical weights in the folder of a port, by their names in a `PortedModel`."""
    arrays = files.read(folder / "weights.safetensors")
    places: Places = port_weights.read_config(folder)["weights"]
    return {f"{NET}.{path}": place.to_torch(arrays[place.name]) for path, place in places.items() if place.is_saved}


def logits_of(output: Any, config: ModelConfig, array: type) -> Any:
    """Returns the logits of a module's output: the array, or the item `logits` of a dict or a data class."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, array):
        raise UsageError(
            f"{config.type}: returns a {type(output).__name__} without logits; name a module that returns the logits"
        )
    return found
