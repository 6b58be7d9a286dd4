"""Every array of a port by path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from icenet.porting.load import to_array, to_numpy


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Returns the arrays by path; those of attributes that begin with "_", too."""
    return {path: to_numpy(holder[key]) for path, holder, key in _places(model)}


def assign(model: nn.Module, values: Mapping[str, np.ndarray]) -> None:
    """Sets arrays by path; they keep their dtypes."""
    for path, holder, key in _places(model):
        if path in values:
            holder[key] = to_array(values[path]).astype(holder[key].dtype)


def _places(holder: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
        inner = f"{path}.{name}" if path else str(name)
        if isinstance(value, mx.array):
            yield inner, holder, name
        elif isinstance(value, (dict, list)):
            yield from _places(value, inner)
