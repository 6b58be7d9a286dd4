"""Where a port has the arrays of its original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Place:
    """Where a port has an array of its original.

    Attributes:
        name: The path of the array in the port.
        axes: The axes of the original in the order of the port; empty if they are the same.
        kind: parameter, buffer or constant. Constants belong to the graph, and the original has none of them.
        is_saved: Whether the original's `state_dict` has it.
    """

    name: str
    axes: tuple[int, ...] = ()
    kind: str = "parameter"
    is_saved: bool = True

    def to_port(self, array: np.ndarray) -> np.ndarray:
        """Returns an array of the original with the axes of the port."""
        return array.transpose(self.axes) if self.axes else array

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Returns an array of the port with the axes of the original."""
        return array.transpose(np.argsort(self.axes)) if self.axes else array


Places = Mapping[str, Place]
"""The places of a port by the path in the original."""


def as_dict(places: Places) -> dict[str, Any]:
    """Returns places in JSON types."""
    return {path: asdict(place) for path, place in places.items()}
